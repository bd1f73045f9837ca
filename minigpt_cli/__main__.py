"""`python -m minigpt_cli`: the same command line as `minigpt`, and what torchrun starts."""

from minigpt_cli.commands import main

main()
