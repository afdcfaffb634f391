"""What is minimised: a sum over a batch, and the weight that divides it."""
