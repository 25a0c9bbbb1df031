"""What a compiled kernel does with global memory before it waits for the kernel in front of it, on any way through it.

Read from its PTX: which instructions come before `griddepcontrol.wait` follows from the branches, and which argument an address
is made of from the registers that it goes through. What was loaded is no address of its own: a block's number in a table makes
the address of a key an address in the keys.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

WAIT = "griddepcontrol.wait"

_PARAMETER = re.compile(r"\.param\s+(.*?)(\w+_param_(\d+))(\[\d+\])?,?$")
_LABEL = re.compile(r"^(\$\w+):")
_REGISTER = re.compile(r"%[a-z]+\d+|\b\w+_param_\d+\b")
_ADDRESS = re.compile(r"\[([^\]]*)\]")
_MEMORY = ("ld.", "st.", "atom.", "red.", "cp.", "multimem.", "tensormap.")
_NEAR = (".param", ".shared::cta", ".shared.", ".local", ".const")


@dataclass(frozen=True)
class Before:
    """reads: how many instructions read from each of the kernel's arguments; writes: likewise, atomics included."""

    reads: Counter[str]
    writes: Counter[str]


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    operands: str
    is_conditional: bool

    @property
    def is_far(self) -> bool:
        """Whether it may touch global memory."""
        if not self.opcode.startswith(_MEMORY) or self.opcode.startswith("cp.async.bulk.commit"):
            return False
        return "global" in self.opcode or not any(space in self.opcode + "." for space in _NEAR)

    @property
    def writes(self) -> bool:
        return self.opcode.startswith(("st.", "atom.", "red.", "multimem.", "tensormap.")) or ".global.shared" in (
            self.opcode
        )


def before_wait(kernel: Any) -> Before:
    """Of a compiled kernel with PDL. An address that is made of no argument counts for "unknown"."""
    return before_wait_in(kernel.asm["ptx"], argument_places(kernel.src.signature))


def argument_places(signature: dict[str, str]) -> dict[int, str]:
    """Which parameter of the PTX is which argument: what is constant has none, a tensor descriptor has several."""
    places: dict[int, str] = {}
    number = 0
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        places[number] = name
        # The copy engine's own description, and the sizes and strides of each dimension.
        number += 1 + 2 * (kind.split("[")[1].split("]")[0].count(",") + 1) if kind.startswith("tensordesc") else 1
    return places


def before_wait_in(ptx: str, places: dict[int, str]) -> Before:
    """places: names of the parameters by their numbers; scratch that Triton adds has none."""
    head, _, body = ptx[ptx.index(".entry") :].partition("{")
    pointers = _pointers(head, places)
    instructions, labels = _instructions(body.split(".section")[0])
    origins = _origins(instructions, pointers)
    reads: Counter[str] = Counter()
    writes: Counter[str] = Counter()
    for instruction in _reached(instructions, labels):
        if instruction.is_far:
            addresses = " ".join(_ADDRESS.findall(instruction.operands))
            names = set().union(*(origins.get(register, set()) for register in _REGISTER.findall(addresses)))
            (writes if instruction.writes else reads).update(names or {"unknown"})
    return Before(reads, writes)


def _pointers(head: str, places: dict[int, str]) -> dict[str, str]:
    """The parameters that addresses are made of, and what their arguments are called."""
    pointers = {}
    for line in head.splitlines():
        found = _PARAMETER.search(line.strip())
        if found and (".ptr" in found[1] or found[4]):
            pointers[found[2]] = places.get(int(found[3]), "scratch")
    assert pointers, "a kernel with arguments"
    return pointers


def _instructions(body: str) -> tuple[list[_Instruction], dict[str, int]]:
    """All of them in order, and where labels stand."""
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        text = re.sub(r"//.*", "", line).strip().rstrip(";")
        if found := _LABEL.match(text):
            labels[found[1]] = len(instructions)
            text = text[found.end() :].strip()
        if not text or text[0] in ".{}":
            continue
        is_conditional = text.startswith("@")
        if is_conditional:
            text = text.split(None, 1)[1]
        opcode, _, operands = text.replace("\t", " ").partition(" ")
        assert not opcode.startswith(("brx", "call")), "ways that are not followed here"
        instructions.append(_Instruction(opcode, operands, is_conditional))
    return instructions, labels


def _origins(instructions: Iterable[_Instruction], pointers: dict[str, str]) -> dict[str, set[str]]:
    """Of each register the arguments that its number may be made of, whatever the way to it."""
    origins = {parameter: {name} for parameter, name in pointers.items()}
    made: list[tuple[list[str], list[str]]] = []
    for instruction in instructions:
        if instruction.opcode.startswith(_MEMORY) and not instruction.opcode.startswith("ld.param"):
            continue
        first, _, rest = instruction.operands.partition(",")
        if first.startswith("{"):
            first, _, rest = instruction.operands.partition("}")
        made.append((_REGISTER.findall(first), _REGISTER.findall(rest)))
    is_changed = True
    while is_changed:
        is_changed = False
        for results, sources in made:
            found = set().union(*(origins.get(source, set()) for source in sources))
            for result in results:
                if not found <= origins.setdefault(result, set()):
                    origins[result] |= found
                    is_changed = True
    return origins


def _reached(instructions: list[_Instruction], labels: dict[str, int]) -> list[_Instruction]:
    """What may run before a wait, in the order of the text."""
    reached: set[int] = set()
    ways = [0]
    while ways:
        place = ways.pop()
        while place < len(instructions) and place not in reached:
            instruction = instructions[place]
            if instruction.opcode == WAIT:
                break
            reached.add(place)
            if instruction.opcode.startswith("bra"):
                ways.append(labels[instruction.operands.strip()])
            is_end = instruction.opcode.startswith(("bra", "ret", "exit", "trap"))
            if is_end and not instruction.is_conditional:
                break
            place += 1
    return [instructions[place] for place in sorted(reached)]
