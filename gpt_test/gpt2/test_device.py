"""Names of devices and dtypes: which are accepted, and what the errors say."""

from __future__ import annotations

import pytest
import torch

from gpt2.device import has_bfloat16_units, has_matrix_units, mkl_is_slow, resolve_device, resolve_dtype
from gpt2.training.hardware import measured_peak
from gpt_config import DeviceError


def test_names() -> None:
    assert resolve_dtype("bf16") == resolve_dtype("bfloat16") == resolve_dtype(torch.bfloat16) == torch.bfloat16
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:999", "meta", "cpu:3x", 5, None])
def test_unknown_devices(name: object) -> None:
    with pytest.raises(DeviceError, match="this machine has cpu"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["", "int8", "float", 32, None, torch.int64])
def test_unknown_dtypes(name: object) -> None:
    with pytest.raises(DeviceError, match="use one of float32"):
        resolve_dtype(name)


def test_amx_does_not_count_if_onednn_may_not_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for limit, has_them in (("AVX2", False), ("avx512_core_bf16", False), ("AVX512_CORE_AMX", True), ("DEFAULT", True)):
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            with monkeypatch.context() as patch:
                patch.setenv(name, limit)
                assert has_matrix_units() is has_them
    assert has_matrix_units()


def test_measuring_the_peak_leaves_the_random_state_unchanged() -> None:
    before = torch.get_rng_state()
    assert measured_peak(torch.device("cpu"), torch.float32) > 1e6
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_units_count_if_onednn_may_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for has_avx512 in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_avx512=has_avx512: has_avx512)
        assert has_bfloat16_units() is has_avx512
        for limit, may in (("AVX512_CORE", False), ("AVX2", False), ("AVX512_CORE_BF16", True), ("AVX512_CORE_AMX", True)):
            with monkeypatch.context() as patch:
                patch.setenv("ONEDNN_MAX_CPU_ISA", limit)
                assert has_bfloat16_units() is (has_avx512 and may)


@pytest.mark.parametrize("maker, level, is_slow", [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False)])
def test_mkl_is_slow_on_another_makers_processor(
    monkeypatch: pytest.MonkeyPatch, maker: str, level: str, is_slow: bool
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr("gpt2.device._processor", lambda: f"vendor_id : {maker}")
    assert mkl_is_slow() is is_slow
    monkeypatch.setattr("gpt2.device._processor", lambda: "vendor_id : GenuineIntel")
    assert not mkl_is_slow()
