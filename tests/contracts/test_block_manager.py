"""What every block manager must do: never hand out a block in use, never lose one, change nothing when it refuses."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from chapters import ch02_block_table, ch08_sharing
from pagebrain.block import BlockManager
from pagebrain.errors import BlockError, OutOfBlocksError

IMPLEMENTATIONS: dict[str, Callable[[Any], Any]] = {
    "engine": BlockManager,
    "chapter 02": ch02_block_table.BlockManager,
    "chapter 08": ch08_sharing.BlockManager,
}


@pytest.fixture(params=IMPLEMENTATIONS)
def make(request: pytest.FixtureRequest) -> Callable[[int], Any]:
    return lambda num_blocks: IMPLEMENTATIONS[request.param](SimpleNamespace(num_blocks=num_blocks))


def test_hands_out_every_block_once(make: Callable[[int], Any]) -> None:
    manager = make(5)
    blocks = manager.allocate(3) + manager.allocate() + manager.allocate()
    assert sorted(blocks) == [0, 1, 2, 3, 4] and manager.num_free_blocks == 0


def test_refuses_before_anything_changed_when_too_few_are_free(make: Callable[[int], Any]) -> None:
    manager = make(4)
    manager.allocate(2)
    before = manager.free_blocks
    assert not manager.can_allocate(3) and manager.can_allocate(2)
    with pytest.raises(OutOfBlocksError, match="3 blocks were asked for, but only 2 of 4 are free"):
        manager.allocate(3)
    assert manager.free_blocks == before


def test_a_negative_count_is_refused(make: Callable[[int], Any]) -> None:
    manager = make(4)
    with pytest.raises(BlockError, match="count must be at least 0, got -1"):
        manager.allocate(-1)
    assert manager.num_free_blocks == 4


def test_freeing_twice_is_refused_and_changes_nothing(make: Callable[[int], Any]) -> None:
    manager = make(4)
    first, second = manager.allocate(2)
    manager.free([first])
    for wrong in ([first], [second, first], [second, second]):
        with pytest.raises(BlockError, match="holder|free already|is freed"):
            manager.free(wrong)
        assert manager.num_free_blocks == 3 and manager.ref_count(second) == 1


def test_unknown_block_ids_are_refused(make: Callable[[int], Any]) -> None:
    manager = make(4)
    for wrong in (-1, 4):
        with pytest.raises(BlockError, match="run from 0 to 3"):
            manager.free([wrong])


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    manager = BlockManager(SimpleNamespace(num_blocks=2))  # type: ignore[arg-type]
    (block,) = manager.allocate()
    manager.share(block)
    manager.free([block])
    assert manager.ref_count(block) == 1 and manager.num_free_blocks == 1
    manager.free([block])
    assert manager.ref_count(block) == 0 and manager.num_free_blocks == 2
    with pytest.raises(BlockError, match="free and cannot be shared"):
        manager.share(block)


class BlockLife(RuleBasedStateMachine):
    """Random allocation and freeing against a plain set of blocks in use."""

    implementation: Callable[[Any], Any] = BlockManager

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.manager = type(self).implementation(SimpleNamespace(num_blocks=num_blocks))
        self.total = num_blocks
        self.held: set[int] = set()

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        if count > self.total - len(self.held):
            with pytest.raises(OutOfBlocksError):
                self.manager.allocate(count)
            return
        blocks = self.manager.allocate(count)
        assert len(set(blocks)) == count and not self.held.intersection(blocks)
        self.held.update(blocks)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True)) if self.held else []
        self.manager.free(blocks)
        self.held.difference_update(blocks)

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        if hasattr(self, "manager"):
            assert set(self.manager.free_blocks) == set(range(self.total)) - self.held
            assert self.manager.num_free_blocks == self.total - len(self.held)
            assert all(self.manager.ref_count(block) == (block in self.held) for block in range(self.total))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_block_is_lost_or_given_twice_in_any_order(name: str) -> None:
    implementation = staticmethod(IMPLEMENTATIONS[name])
    run_state_machine_as_test(type("Life", (BlockLife,), {"implementation": implementation}))
