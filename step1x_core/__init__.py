"""The Step1X-Edit model, without node classes and without UI.

Everything directly in this package is plain torch and imports without ComfyUI;
`step1x_core.host` holds the contact with ComfyUI.
"""
