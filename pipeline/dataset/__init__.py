"""From a folder of pictures and captions to a manifest that says what the model will see."""
