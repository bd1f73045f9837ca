"""To and from Hugging Face's folders: config.json, model.safetensors, tokenizer.json. Needs no library of theirs but
`tokenizers` and `safetensors`, which the core has anyway.

    write(checkpoint, folder)     what `minigpt export --to hf` does
    read(folder) -> Checkpoint    what `minigpt import` does
"""

from minigpt_cli.extras.huggingface.read import read, read_tokenizer
from minigpt_cli.extras.huggingface.write import write

__all__ = ["read", "read_tokenizer", "write"]
