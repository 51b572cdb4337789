"""An application: softmax regression trained on MNIST and the data sets like it."""
