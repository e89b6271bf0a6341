"""The Step1X-Edit model, without node classes and without UI: one room for each idea.

Everything but `step1x_core.host` is plain torch and imports without ComfyUI. tests/pure/house/test_house.py holds
which room may import which.
"""
