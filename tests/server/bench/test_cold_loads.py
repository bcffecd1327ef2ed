from deltaserve.server.bench.cold_loads import of_model, parse, since

PAGE = """\
# HELP deltaserve_variant_load_seconds How long a variant took to load.
# TYPE deltaserve_variant_load_seconds histogram
deltaserve_variant_load_seconds_bucket{model_name="a",le="0.1"} 2.0
deltaserve_variant_load_seconds_count{model_name="a"} 3.0
deltaserve_variant_load_seconds_sum{model_name="a"} 0.7
deltaserve_variant_load_seconds_count{model_name="org/b"} 1.0
other_total{model_name="a"} 9.0
"""


def test_counts_by_variant_are_read() -> None:
    assert parse(PAGE) == {"a": 3, "org/b": 1}


def test_page_without_such_a_counter_says_nothing() -> None:
    assert parse("# TYPE other counter\nother_total 9.0\n") is None


def test_nothing_loaded_yet_is_zero_and_not_unknown() -> None:
    before = parse("# TYPE deltaserve_variant_load_seconds histogram\n")
    assert since(before, parse(PAGE)) == {"a": 3, "org/b": 1}
    assert since(parse(PAGE), parse(PAGE)) == {}
    assert since(None, parse(PAGE)) is None


def test_model_without_metrics_of_its_own_is_unknown_and_not_zero() -> None:
    assert of_model({"a": 2}, "b") == 0
    assert of_model({"a": 2, "other": 5}, "b") is None
    assert of_model(None, "a") is None


def test_adapter_is_told_apart_from_its_base() -> None:
    kind = "# TYPE vllm:lora_adapter_load_seconds histogram\n"
    assert parse(kind + 'vllm:lora_adapter_load_seconds_count{model_name="base",adapter_name="a"} 2.0\n') == {"a": 2}
