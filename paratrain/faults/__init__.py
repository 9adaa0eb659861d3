"""What goes wrong in weeks of training, one kind a file: hangs, signals, restart loops, bad batches, memory."""

INTERRUPTED = 75
"""Exit code after a signal ended training with a checkpoint (EX_TEMPFAIL of sysexits.h): start the same command again to go on."""

HUNG = 76
"""Exit code of a rank whose step deadline passed; its stack is in <output_dir>/hang/."""
