from deltaserve.server.bench.cold_loads import parse, since

PAGE = """\
# HELP deltaserve:variant_load_seconds How long a variant took to load.
# TYPE deltaserve:variant_load_seconds histogram
deltaserve:variant_load_seconds_bucket{variant="a",le="0.1"} 2.0
deltaserve:variant_load_seconds_count{model_name="base",variant="a"} 3.0
deltaserve:variant_load_seconds_sum{model_name="base",variant="a"} 0.7
deltaserve:variant_load_seconds_count{variant="org/b"} 1.0
other_total{variant="a"} 9.0
"""


def test_counts_by_variant_are_read() -> None:
    assert parse(PAGE) == {"a": 3, "org/b": 1}


def test_page_without_such_a_counter_says_nothing() -> None:
    assert parse("# TYPE other counter\nother_total 9.0\n") is None


def test_nothing_loaded_yet_is_zero_and_not_unknown() -> None:
    before = parse("# TYPE deltaserve:variant_load_seconds histogram\n")
    assert since(before, parse(PAGE)) == {"a": 3, "org/b": 1}
    assert since(parse(PAGE), parse(PAGE)) == {}
    assert since(None, parse(PAGE)) is None
