"""What a request may ask of the connector, and what is refused."""

from types import SimpleNamespace

import pytest

from jaxkv.connector.request_params import RequestParams
from jaxkv.errors import RequestError
from jaxkv.offload.base import OffloadPolicy


def params_of(params=None, **attributes):
    return RequestParams.of(SimpleNamespace(request_id="r", kv_transfer_params=params, **attributes))


@pytest.mark.parametrize("request_", [SimpleNamespace(), SimpleNamespace(kv_transfer_params=None)])
def test_a_request_without_parameters_has_no_limits(request_):
    params = RequestParams.of(request_)
    assert params == RequestParams()
    assert (params.load_limit(16, 100), params.store_limit(100)) == (100, 100)


def test_parameters_of_other_connectors_are_passed_on_and_not_read():
    params = params_of({"do_remote_prefill": True, "max_load_tokens": 3})
    assert params.max_load_tokens == 3
    assert params.context("r").kv_transfer_params == {"do_remote_prefill": True, "max_load_tokens": 3}


@pytest.mark.parametrize(("cap", "limit"), [(0, 16), (5, 21), (84, 100), (1000, 100)])
def test_max_load_tokens_count_from_the_end_of_the_device_hit(cap, limit):
    assert params_of({"max_load_tokens": cap}).load_limit(16, 100) == limit


def test_a_device_hit_beyond_the_limit_does_not_raise_it():
    assert params_of({"max_load_tokens": 4}).load_limit(100, 99) == 99
    assert params_of({"kv_load_tiers": []}).load_limit(100, 99) == 99


@pytest.mark.parametrize(("cap", "limit"), [(0, 0), (7, 7), (1000, 100)])
def test_max_offload_tokens_count_from_the_first_token(cap, limit):
    assert params_of({"max_offload_tokens": cap}).store_limit(100) == limit


def test_skipping_the_prefix_cache_stops_loads_and_no_stores():
    params = params_of(skip_reading_prefix_cache=True)
    assert (params.load_limit(16, 100), params.store_limit(100)) == (16, 100)


@pytest.mark.parametrize(
    ("value", "tiers"),
    [
        (None, None),
        (["host"], {"host"}),
        ([{"medium": "CPU"}], {"host"}),
        (({"medium": "Disk"}, "host"), {"disk", "host"}),
        ([{}], None),
        ([{"medium": None}, "host"], None),
        ([], set()),
    ],
)
def test_load_tiers_are_media(value, tiers):
    assert params_of({"kv_load_tiers": value}).context("r").load_tiers == tiers


def test_no_tier_at_all_means_no_load():
    assert params_of({"kv_load_tiers": []}).load_limit(16, 100) == 16


@pytest.mark.parametrize("of_request", list(OffloadPolicy))
@pytest.mark.parametrize("of_backend", list(OffloadPolicy))
def test_every_chunk_is_offered_where_request_or_backend_wants_it(of_request, of_backend):
    everything = OffloadPolicy.REQUEST_LEVEL
    policy = params_of({"offload_policy": of_request.value}).policy(of_backend)
    assert (policy is everything) == (of_request is everything or of_backend is everything)


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ([("max_load_tokens", 1)], "mapping"),
        ({"max_load_tokens": -1}, "max_load_tokens.*-1"),
        ({"max_load_tokens": True}, "max_load_tokens.*True"),
        ({"max_offload_tokens": 1.5}, "max_offload_tokens.*1.5"),
        ({"max_offload_tokens": "12"}, "max_offload_tokens.*'12'"),
        ({"kv_load_tiers": "host"}, "kv_load_tiers.*'host'"),
        ({"kv_load_tiers": {"medium": "host"}}, "kv_load_tiers.*list"),
        ({"kv_load_tiers": 3}, "kv_load_tiers.*3"),
        ({"kv_load_tiers": [None]}, "medium.*None"),
        ({"kv_load_tiers": [""]}, "medium.*''"),
        ({"kv_load_tiers": [{"medium": "host", "locality": "REMOTE"}]}, "medium alone.*REMOTE"),
        ({"offload_policy": "all"}, "chunk_level.*request_level.*'all'"),
        ({"offload_policy": []}, "offload_policy"),
    ],
)
def test_a_parameter_that_means_nothing_is_refused_by_name_and_value(params, named):
    with pytest.raises(RequestError, match=named):
        params_of(params)
