"""Write the table of docs/methods.md: what each method trains, shares and sends, computed from the methods themselves.

    python scripts/write_methods_table.py

Bytes are those of one client in one round of a 7B model (32 layers, q and v of 4096 x 4096, float32) at rank 16 with 20
clients that all take part. They are counted on the tensors that a server step and a broadcast of the real code make for
one module, times 64 modules. A test tells when the page is out of date.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sfedlora.methods import METHODS, Method, aggregate, broadcast_tensors, make_method
from sfedlora.types import AdapterLayout, LoraSize, LoraSizes, Part, ServerState, Target, Tensors, Update

__all__ = ["methods_page"]

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
BEGIN, END = "<!-- Begin of the table that scripts/write_methods_table.py writes. -->", "<!-- End of the table. -->"
NUM_MODULES, FEATURES, RANK, NUM_CLIENTS = 64, 4096, 16, 20
LAYOUT = AdapterLayout((Target("q_proj", FEATURES, FEATURES),), {})
SIZES = LoraSizes(LoraSize(RANK, 2.0))
HEADER = (
    "| `method.name` | trained | sent up | exact | a rank per client | server optimizers | privacy that fits | "
    "up, MB | down, MB | down after an absence, MB |\n" + "|---" * 10 + "|\n"
)


def methods_page(page: str) -> str:
    """The page with its table renewed."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = "\n".join(_row(name) for name in METHODS)
    return f"{before}{BEGIN}\n{HEADER}{rows}\n{END}{after}"


def _row(name: str) -> str:
    method = make_method(name)
    traits = method.traits
    up, down, late = _traffic(method)
    cells = (
        f"`{name}`",
        _by_round(method, "trained"),
        _by_round(method, "shared"),
        traits.exact,
        "yes" if traits.heterogeneous_ranks else "no",
        "yes" if traits.server_optimizers and method.shared_parts(1) else "no",
        _privacy(method),
        *("0" if value == 0 or traits.pools_data else f"{value / 1e6:.1f}" for value in (up, down, late)),
    )
    return "| " + " | ".join(cells) + " |"


def _by_round(method: Method, what: str) -> str:
    """The factors of rounds 1 and 2, in words."""
    parts = [
        (method.trained_parts(number) if what == "trained" else method.shared_parts(number)) - {Part.HEAD}
        for number in (1, 2)
    ]
    odd, even = (", ".join(part.value.upper() for part in sorted(found)) or "nothing" for found in parts)
    if what == "shared" and method.traits.pools_data:
        return "nothing: the data are in one place"
    return odd if odd == even else f"{odd} in odd rounds, {even} in even ones"


def _privacy(method: Method) -> str:
    """What can be laid over the server step: noise on each update always, the rest only over a plain mean."""
    if method.traits.pools_data or not method.shared_parts(1):
        return "-"
    return "local, central, secure aggregation" if method.traits.is_mean else "local"


def _traffic(method: Method) -> tuple[int, int, int]:
    """Bytes of one client up in round 3, down in it, and down in it for one that was absent in round 2."""
    state = ServerState(0, _draw(0), {})
    for round_num in (1, 2):
        state = aggregate(method, state, _updates(method, round_num), weighting="uniform", sizes=SIZES)
    sent = _updates(method, 3)[0].tensors
    down, late = (
        broadcast_tensors(method, state, is_current=is_current, server=SIZES.server, client=SIZES.server)
        for is_current in (True, False)
    )
    return NUM_MODULES * _num_bytes(sent), NUM_MODULES * _num_bytes(down), NUM_MODULES * _num_bytes(late)


def _updates(method: Method, round_num: int) -> list[Update]:
    parts = method.shared_parts(round_num)
    count = 1 if method.traits.pools_data else NUM_CLIENTS
    return [
        Update(
            str(number),
            round_num,
            1,
            {name: tensor for name, tensor in _draw(round_num, number).items() if Part(name[0]) in parts},
        )
        for number in range(count)
    ]


def _draw(*address: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(hash(address) % 2**31)
    shapes = LAYOUT.shapes(RANK, [Part.A, Part.B])
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _num_bytes(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


if __name__ == "__main__":
    PAGE.write_text(methods_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
