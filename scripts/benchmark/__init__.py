"""Speed and memory of the losses and the trainer, beside those of others."""
