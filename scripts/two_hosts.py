"""A model split over two machines, which this one plays: are the tokens those of one machine?

    python scripts/two_hosts.py                 2 machines of one rank, a link of 1 Gbit/s
    python scripts/two_hosts.py --ranks 2       of two ranks each

Each machine is a network namespace with a host name, processes and a /dev/shm of its own, and a veth between them whose rate
`tc` limits. It takes root, `ip`, `tc` and `unshare`, and removes what it has made.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

import hfopt

_NAMES = ("hfopt-a", "hfopt-b")
_ADDRESSES = ("10.77.61.1", "10.77.61.2")
_LINKS = ("hfopt-veth-a", "hfopt-veth-b")
_PORT = 29577
_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}


def requests(model: Any) -> dict[str, Any]:
    """Tokens of a greedy search, of beams and of samples behind padded prompts, and ms a token."""
    prompt = torch.randint(5, 900, (2, 23), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    given = {"attention_mask": mask, "max_new_tokens": 50, "min_new_tokens": 50, "pad_token_id": 0}
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "beams": {"do_sample": False, "num_beams": 4},
        "samples": {"do_sample": True, "num_return_sequences": 2},
    }
    found: dict[str, Any] = {}
    for name, way in ways.items():
        torch.manual_seed(3)
        found[name] = model.generate(prompt, **given, **way).tolist()
    begin = time.perf_counter()
    model.generate(prompt, **given, do_sample=False)
    found["ms a token"] = 20 * (time.perf_counter() - begin)
    return found


def work(folder: str) -> None:
    """Of each rank; the first one writes what it has found."""
    dist.init_process_group("gloo")
    model = hfopt.load(folder, tensor_parallel=True)
    found = requests(model)
    if dist.get_rank() == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may wait


def command(*arguments: str) -> None:
    subprocess.run(arguments, check=True)


def remove() -> None:
    for name in _NAMES:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def connect(rate: str) -> None:
    """The two namespaces, and the link between them."""
    for name in _NAMES:
        command("ip", "netns", "add", name)
    command("ip", "link", "add", _LINKS[0], "type", "veth", "peer", "name", _LINKS[1])
    for name, link, address in zip(_NAMES, _LINKS, _ADDRESSES, strict=True):
        inside = ("ip", "netns", "exec", name)
        command("ip", "link", "set", link, "netns", name)
        command(*inside, "ip", "addr", "add", f"{address}/24", "dev", link)
        for each in (link, "lo"):
            command(*inside, "ip", "link", "set", each, "up")
        limit = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
        command(*inside, "tc", "qdisc", "add", "dev", link, *limit)


def on_two(folder: str, n_ranks: int) -> dict[str, Any]:
    """What the ranks of both have found."""
    started = []
    for place, (name, link) in enumerate(zip(_NAMES, _LINKS, strict=True)):
        launch = (
            f"{sys.executable} -m torch.distributed.run --nnodes 2 --node-rank {place} --nproc-per-node {n_ranks} "
            f"--master-addr {_ADDRESSES[0]} --master-port {_PORT} {Path(__file__).resolve()} --folder {folder}"
        )
        inside = f"hostname {name}; mount -t tmpfs tmpfs /dev/shm; mount -t proc proc /proc; exec {launch}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": link}
        own = ("unshare", "--mount", "--uts", "--pid", "--fork", "sh", "-c", inside)
        started.append(subprocess.Popen(["ip", "netns", "exec", name, *own], env=environment))
    codes = [each.wait() for each in started]
    if any(codes):
        raise SystemExit(f"the machines ended with {codes}")
    found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=1, help="of each machine")
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        work(options.folder)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=1000, num_key_value_heads=4, max_position_embeddings=512, **_SIZES)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        expected = requests(hfopt.load(folder))
        remove()
        try:
            connect(options.rate)
            found = on_two(folder, options.ranks)
        finally:
            remove()
    print(f"2 machines of {options.ranks} rank(s), {options.rate}; Llama of {_SIZES}, float32")
    for name in ("greedy", "beams", "samples"):
        print(f"{name}: {'equal' if found[name] == expected[name] else 'DIFFERENT'}")
    print(
        f"ms a token, 2 rows: {found['ms a token']:.2f}, one process of this machine {expected['ms a token']:.2f}"
    )
    sys.exit(any(found[name] != expected[name] for name in ("greedy", "beams", "samples")))


if __name__ == "__main__":
    main()
