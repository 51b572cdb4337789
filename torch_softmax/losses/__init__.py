"""The softmax and its losses: mathematics, chunks of rows, and the derivatives of every order."""
