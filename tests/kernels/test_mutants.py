"""A few of the source mutants with every run; `python -m tests.kernels.mutants` judges all."""

from __future__ import annotations

import random

from kernels.build import SOURCE
from tests.kernels.mutant_list import BULK, COPY, DIGEST, EQUIVALENT, MUTANTS, SASS
from tests.kernels.mutants import judge_all
from tests.kernels.toolchain import Toolchain

SEED = 3


def test_every_mutant_changes_the_source_in_its_own_way() -> None:
    source = SOURCE.read_text()
    changed = [mutant.apply(source) for mutant in (*MUTANTS, *EQUIVALENT)]
    assert source not in changed
    names = [mutant.name for mutant in (*MUTANTS, *EQUIVALENT)]
    assert len(set(names)) == len(names) and len(set(changed)) == len(changed)
    assert all(mutant.reason for mutant in EQUIVALENT)


def test_a_sample_is_noticed(compiler: Toolchain) -> None:
    draw = random.Random(SEED)
    families = [[mutant for mutant in MUTANTS if mutant.family == family] for family in (COPY, DIGEST, BULK, SASS)]
    verdicts = judge_all([draw.choice(family) for family in families], quiet=True)
    assert not [verdict for verdict in verdicts if not verdict.killed_by]
