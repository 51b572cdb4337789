"""What the losses do in a whole model."""
