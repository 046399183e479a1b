from __future__ import annotations
from dataclasses import dataclass

@dataclass(frozen=True, slots=True)
class Encoded:
    ids: tuple
    labelled: tuple
    end: tuple
    @property
    def n_labelled(self): return sum(self.labelled)

class Chat:
    def __init__(self, tokenizer, template="auto", system=None):
        self.t=tokenizer; self.name="chat" if template=="auto" else template; self.source=tokenizer.chat_template; self.system=system
        self.end_ids={tokenizer.eos_token_id}
    def prompt_text(self, messages):
        m=list(messages)
        if self.system is not None: m=[{"role":"system","content":self.system},*m]
        return self.t.apply_chat_template(m,tokenize=False,add_generation_prompt=True)
    def prompt(self, messages):
        return self.t(self.prompt_text(messages),add_special_tokens=False)["input_ids"]
    def encode(self, messages, *, loss_on="assistant", max_length=None):
        p=self.prompt(messages[:-1]); a=self.t(messages[-1]["content"],add_special_tokens=False)["input_ids"]
        ids=tuple(p)+tuple(a)+(self.t.eos_token_id,)
        lab=(False,)*len(p)+(True,)*(len(a)+1)
        end=(False,)*(len(p)+len(a))+(True,)
        return Encoded(ids[:max_length],lab[:max_length],end[:max_length])
    def encode_text(self, text, *, max_length=None):
        a=self.t(text,add_special_tokens=False)["input_ids"]
        ids=tuple(a)+(self.t.eos_token_id,)
        return Encoded(ids[:max_length],((False,)+(True,)*len(a))[:max_length],((False,)*len(a)+(True,))[:max_length])
    def show(self, e): return self.t.decode(list(e.ids))
