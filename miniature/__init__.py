"""Training and evaluating a miniature image-editing model on drawn scenes."""
