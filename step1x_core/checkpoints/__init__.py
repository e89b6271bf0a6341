"""Files of models and LoRAs: finding and checking them, names of layers in every layout, quantised formats, conversion. Imports the ground floor only."""
