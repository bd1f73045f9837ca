"""What is slow and correct: the model, its loss, its optimizer and its decoding, written down from the mathematics.

The fast path in `minigpt_cli.core` is compared with this, and benchmarks measure against it ("naive"). Nothing here
imports the code it judges, except `weights`, which carries numbers from one to the other.
"""
