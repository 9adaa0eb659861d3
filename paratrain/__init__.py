"""paratrain: train any PyTorch module on one process or thousands; the layout never changes the loss."""
