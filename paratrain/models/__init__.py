"""Models to train out of the box: plain `nn.Module`s that know nothing of paratrain."""
