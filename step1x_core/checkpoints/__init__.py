"""Files of models and LoRAs: finding and checking them, layer names in every layout, quantised formats, conversion.

Imports the ground floor only.
"""
