"""The Hydra groups of paratrain: installed as `paratrain.conf`, extended by your own conf directory."""
