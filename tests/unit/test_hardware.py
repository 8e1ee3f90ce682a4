"""What a processor is said to multiply fast, and the core that is left to another thread."""

import pytest
import torch

from trak.hardware import multiplies_bfloat16, multiplies_bytes, one_core_left


@pytest.fixture
def amx(monkeypatch):
    """A CPU with AMX, and PyTorch with its library."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    both = {"amx_int8": True, "amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: both, raising=False)
    return both


def test_bytes_are_not_multiplied_without_instructions_for_it(monkeypatch, amx):
    """No AMX, a PyTorch that cannot tell, one without the product and one whose product is wrong."""
    plain = multiplies_bytes.__wrapped__
    assert plain()
    amx["amx_int8"] = False
    assert not plain()
    amx["amx_int8"] = True
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: (left.float() @ right.float()).char())
    assert not plain()
    monkeypatch.delattr(torch, "_int_mm")
    assert not plain()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not plain()


def test_bfloat16_is_multiplied_where_it_is_fast(monkeypatch, amx):
    plain = multiplies_bfloat16.__wrapped__
    assert plain(torch.device("cpu"))
    assert not plain(torch.device("mps"))
    amx["amx_bf16"] = False
    assert not plain(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert plain(torch.device("cuda", 0)) is expected


@pytest.mark.parametrize(
    ("threads", "cores", "inside"), [(2, 2, 1), (4, 2, 1), (1, 2, 1), (1, 1, 1), (2, 8, 2)]
)
def test_a_core_is_left_where_all_are_taken(threads, cores, inside, monkeypatch):
    monkeypatch.setattr("trak.hardware.available_cores", lambda: cores)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with one_core_left():
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == threads
        with pytest.raises(KeyError), one_core_left():
            raise KeyError
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
