"""How fast, how well used, and where that is written: FLOPs and peaks, the meter, the sinks, the environment report."""
