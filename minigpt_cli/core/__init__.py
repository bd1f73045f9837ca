"""The shared model and engine. It knows no terminal: nothing here imports Typer or Rich."""
