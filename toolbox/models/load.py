from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
from toolbox.shell.errors import *
@dataclass(frozen=True)
class ModelSource:
    name: str; kind: str; path: Path | None
def find_model(name, *, trust_remote_code=False):
    if name=="smollm2": return ModelSource(name,"smollm2",Path("/tmp/smol"))
    if Path(name).is_dir(): return ModelSource(name,"directory",Path(name))
    raise MissingInput(f"{name}: no such model")
def prepare(source, say=None): return source.path
def load_tokenizer(source, *, trust_remote_code=False):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(source.path)
def load_model(source, *, dtype="fp32", trust_remote_code=False):
    import torch
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(source.path, dtype={"fp32":torch.float32,"bf16":torch.bfloat16}[dtype]).eval()
