"""What a policy keeps: rule by rule, together, and whatever the history looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import InvalidArgument
from basin.layers.snapshots.retention import UNLIMITED, Decision, Duration, Policy, decide, group_of

NOW = datetime(2024, 3, 31, 12, tzinfo=UTC)
HOUR_NS = 3_600_000_000_000


@dataclass(frozen=True)
class Made:
    """A snapshot, as far as retention looks at it."""

    id: str
    start_ns: int
    host: str = "host"
    paths: Sequence[str] = ("/home",)
    tags: Sequence[str] = ()
    complete: bool = True


def ns(moment: datetime) -> int:
    return int(moment.timestamp()) * 1_000_000_000


def made(*moments: str, **fields: Any) -> list[Made]:
    """Snapshots of times in UTC; the id is the time."""
    return [Made(text, ns(datetime.fromisoformat(text).replace(tzinfo=UTC)), **fields) for text in moments]


def judged(snapshots: Sequence[Made], policy: Policy, now: datetime = NOW, zone: Any = UTC) -> list[Decision]:
    return decide(snapshots, policy, ns(now), zone=zone)


def kept(snapshots: Sequence[Made], policy: Policy, now: datetime = NOW, zone: Any = UTC) -> list[str]:
    return [one.snapshot.id for one in judged(snapshots, policy, now, zone) if one.keep]


def only(rule: str, number: int) -> Policy:
    values: dict[str, Any] = {rule: number}
    return Policy(**values)


# --- rule by rule -----------------------------------------------------------------------------------------------------


def test_the_last_ones_are_kept() -> None:
    snapshots = made("2024-01-03", "2024-01-01", "2024-01-02")
    assert kept(snapshots, Policy(last=2)) == ["2024-01-03", "2024-01-02"]
    assert kept(snapshots, Policy(last=9)) == kept(snapshots, Policy(last=UNLIMITED)) == [one.id for one in snapshots]


PERIODS = [
    # rule, snapshots of three periods with two in the middle one, the one that is not kept
    ("hourly", ["2024-01-01 10:00", "2024-01-01 11:10", "2024-01-01 11:50", "2024-01-01 12:00"]),
    ("daily", ["2024-01-01 23:59", "2024-01-02 00:00", "2024-01-02 23:59", "2024-01-03 00:00"]),
    ("weekly", ["2023-12-31 23:59", "2024-01-01 00:00", "2024-01-07 23:59", "2024-01-08 00:00"]),
    ("monthly", ["2024-01-31 23:59", "2024-02-01 00:00", "2024-02-29 23:59", "2024-03-01 00:00"]),
    ("yearly", ["2021-12-31 23:59", "2022-01-01 00:00", "2022-12-31 23:59", "2023-01-01 00:00"]),
]


@pytest.mark.parametrize(("rule", "moments"), PERIODS, ids=[rule for rule, _ in PERIODS])
def test_the_newest_of_each_period_is_kept(rule: str, moments: list[str]) -> None:
    snapshots = made(*moments)
    first, early, late, newest = moments
    assert kept(snapshots, only(rule, 1)) == [newest]
    assert kept(snapshots, only(rule, 2)) == [late, newest]
    assert kept(snapshots, only(rule, 3)) == [first, late, newest]
    assert early not in kept(snapshots, only(rule, UNLIMITED))
    assert {one.reasons for one in judged(snapshots, only(rule, 1)) if one.keep} == {(f"{rule} snapshot",)}


def test_periods_without_a_snapshot_do_not_count() -> None:
    snapshots = made("2020-05-05", "2022-07-07", "2024-01-01")
    assert kept(snapshots, Policy(daily=2)) == ["2022-07-07", "2024-01-01"]


def test_the_same_week_or_month_of_another_year_is_another() -> None:
    snapshots = made("2021-03-11", "2022-03-10", "2023-03-09")
    for rule in ("weekly", "monthly"):
        assert kept(snapshots, only(rule, 2)) == ["2022-03-10", "2023-03-09"]


def test_the_oldest_is_kept_while_a_rule_has_not_kept_its_number() -> None:
    snapshots = made("2024-01-01 01:00", "2024-01-01 02:00", "2024-01-02 01:00", "2024-01-02 02:00")
    assert kept(snapshots, Policy(daily=2)) == ["2024-01-01 02:00", "2024-01-02 02:00"]
    assert kept(snapshots, Policy(daily=3)) == ["2024-01-01 01:00", "2024-01-01 02:00", "2024-01-02 02:00"]
    assert kept(snapshots, Policy(yearly=1)) == ["2024-01-02 02:00"]
    assert kept(snapshots, Policy(yearly=2)) == ["2024-01-01 01:00", "2024-01-02 02:00"]


def test_days_begin_where_the_zone_says() -> None:
    snapshots = made("2024-01-01 22:30", "2024-01-01 23:30", "2024-01-02 00:30")
    assert kept(snapshots, Policy(daily=2)) == ["2024-01-01 23:30", "2024-01-02 00:30"]
    assert kept(snapshots, Policy(daily=2), zone=timezone(timedelta(hours=1))) == [
        "2024-01-01 22:30",
        "2024-01-02 00:30",
    ]


def test_the_hour_that_comes_twice_is_two() -> None:
    snapshots = made("2024-10-26 23:30", "2024-10-27 00:30", "2024-10-27 01:30")  # 1:30, and twice 2:30
    berlin = ZoneInfo("Europe/Berlin")
    assert kept(snapshots, Policy(hourly=2), zone=berlin) == ["2024-10-27 00:30", "2024-10-27 01:30"]


def test_the_zone_of_the_machine_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    snapshots = made("2024-01-01 22:30", "2024-01-01 23:30", "2024-01-02 00:30")
    for name, expected in (("UTC", "2024-01-01 23:30"), ("XYZ-1", "2024-01-01 22:30")):
        with monkeypatch.context() as patch:
            patch.setenv("TZ", name)
            time.tzset()
            assert kept(snapshots, Policy(daily=2), zone=None) == [expected, "2024-01-02 00:30"]
    time.tzset()


def test_what_lies_within_a_duration_of_the_newest_is_kept() -> None:
    snapshots = made("2022-02-27", "2022-02-28", "2023-02-27 23:59", "2023-02-28", "2024-03-30", "2024-03-31")
    within = [
        ("1d", ["2024-03-30", "2024-03-31"]),
        ("23h", ["2024-03-31"]),
        ("1y1m", ["2023-02-28", "2024-03-30", "2024-03-31"]),
        ("1y1m1h", ["2023-02-27 23:59", "2023-02-28", "2024-03-30", "2024-03-31"]),
        ("25m", ["2022-02-28", "2023-02-27 23:59", "2023-02-28", "2024-03-30", "2024-03-31"]),
    ]
    for text, expected in within:
        assert kept(snapshots, Policy(within=Duration.parse(text))) == expected, text
    later = datetime(2035, 1, 1, tzinfo=UTC)
    assert kept(snapshots, Policy(within=Duration.parse("1d")), later) == ["2024-03-30", "2024-03-31"]


def test_a_snapshot_of_the_future_takes_no_other_away() -> None:
    snapshots = made("2024-03-30 13:00", "2024-03-31 11:00", "2031-01-01")
    assert kept(snapshots, Policy(within=Duration(days=1))) == [one.id for one in snapshots]


def test_a_day_is_a_day_where_the_clocks_are_changed() -> None:
    berlin = ZoneInfo("Europe/Berlin")  # At 2 o'clock on March 31 it is 3.
    snapshots = made("2024-03-30 09:59", "2024-03-30 10:00", "2024-03-30 11:00", "2024-03-31 10:00")
    assert kept(snapshots, Policy(within=Duration(days=1)), zone=berlin) == ["2024-03-30 11:00", "2024-03-31 10:00"]
    hours = kept(snapshots, Policy(within=Duration(hours=24)), zone=berlin)
    assert hours == ["2024-03-30 10:00", "2024-03-30 11:00", "2024-03-31 10:00"]


def test_what_has_a_tag_is_kept() -> None:
    snapshots = [
        *made("2024-01-01", tags=("a", "b")),
        *made("2024-01-02", tags=("a",)),
        *made("2024-01-03", tags=("c",)),
        *made("2024-01-04"),
    ]
    assert kept(snapshots, Policy(tags=["a"])) == ["2024-01-01", "2024-01-02"]
    assert kept(snapshots, Policy(tags=["a,b", "c"])) == ["2024-01-01", "2024-01-03"]
    assert kept(snapshots, Policy(tags=["d"])) == []


def test_a_snapshot_is_kept_for_all_the_reasons_there_are() -> None:
    (decision,) = judged(made("2024-01-01", tags=("a",)), Policy(1, 1, 1, 1, 1, 1, Duration.parse("2y5m7d3h"), ["a"]))
    assert decision.keep
    assert sorted(decision.reasons) == [
        "daily snapshot",
        "hourly snapshot",
        "last snapshot",
        "monthly snapshot",
        "tag a",
        "weekly snapshot",
        "within 2y5m7d3h",
        "yearly snapshot",
    ]


# --- groups, and interrupted ones -------------------------------------------------------------------------------------


def test_hosts_and_paths_are_judged_apart() -> None:
    snapshots = [
        *made("2024-01-01"),
        *made("2024-01-02", host="other"),
        *made("2024-01-03", paths=("/home", "/etc")),
        *made("2024-01-04", paths=("/etc", "/home", "/etc")),
    ]
    assert kept(snapshots, Policy(last=1)) == ["2024-01-01", "2024-01-02", "2024-01-04"]
    assert group_of(snapshots[2]) == group_of(snapshots[3]) == ("host", ("/etc", "/home"))


def test_an_interrupted_one_is_forgotten_only_when_a_later_one_is_complete() -> None:
    (old,), (new,) = made("2024-01-01", complete=False), made("2024-01-03", complete=False)
    (between,) = made("2024-01-02")
    (other,) = made("2024-01-04", host="other")
    policy = Policy(last=1, daily=5, within=Duration(years=9))
    assert kept([old, new, other], policy) == ["2024-01-01", "2024-01-03", "2024-01-04"]
    decisions = judged([old, between, new, other], policy)
    assert [one.keep for one in decisions] == [False, True, True, True]
    assert decisions[0].reasons == ("interrupted, and a later snapshot is complete",)
    assert decisions[2].reasons == ("interrupted, and no later snapshot is complete",)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"within": Duration()},
        {"last": -2},
        {"daily": 1.5},
        {"last": True},
        {"tags": "a"},
        {"tags": [""]},
        {"tags": [","]},
    ],
    ids=repr,
)
def test_an_empty_or_impossible_policy_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        Policy(**fields)


@pytest.mark.parametrize(
    "text", ["", " ", "7", "d", "1w", "-1d", "1d2", "1h1d", "1d1d", "1.5d", "9999999999d", "1d 1h"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="not a duration"):
        Duration.parse(text)


@given(st.builds(Duration, *[st.integers(0, 999_999_999)] * 4))
def test_a_duration_reads_as_it_is_written(duration: Duration) -> None:
    assert Duration.parse(str(duration)) == duration
    assert Duration.parse(f" {duration}".upper()) == duration


# --- whatever the history ---------------------------------------------------------------------------------------------

HOURS = st.integers(0, 24 * 800)
histories = st.lists(
    st.builds(
        lambda at, host, tags, complete: (ns(NOW) - at * HOUR_NS, host, tags, complete),
        HOURS | st.integers(-(10**9), 10**9),
        st.sampled_from(["host", "other"]),
        st.sets(st.sampled_from("abc")),
        st.booleans() | st.just(True),
    ),
    max_size=25,
).map(lambda rows: [Made(f"{at:02}", ns_, host, (), tuple(tags), ok) for at, (ns_, host, tags, ok) in enumerate(rows)])
numbers = st.integers(0, 6)
durations = st.builds(Duration, *[st.integers(0, 3)] * 3, st.integers(0, 40))
fields = st.fixed_dictionaries(
    {
        **dict.fromkeys(("last", "hourly", "daily", "weekly", "monthly", "yearly"), numbers),
        "within": st.none() | durations,
        "tags": st.lists(st.sampled_from(["a", "b", "a,b"]), max_size=2),
    }
)
zones = st.sampled_from(
    [None, UTC, ZoneInfo("Europe/Berlin"), ZoneInfo("America/St_Johns"), ZoneInfo("Asia/Kathmandu")]
)


def policy_of(values: dict[str, Any]) -> Policy:
    return Policy(**values) if any(values.values()) else Policy(last=1)


def enlarged(values: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    """A policy that keeps no less: the larger duration, the sums of the numbers, all tags."""
    larger = {name: values[name] + by[name] for name in values if name != "within"}
    within = [one for one in (values["within"], by["within"]) if one is not None]
    whole = [sum(getattr(one, part) for one in within) for part in ("years", "months", "days", "hours")]
    return {**larger, "within": Duration(*whole) if within else None}


@given(histories, fields, fields, zones, st.booleans())
def test_a_larger_policy_keeps_all_that_the_smaller_one_does(
    history: list[Made], values: dict[str, Any], more: dict[str, Any], zone: Any, unlimited: bool
) -> None:
    small = policy_of(values)
    large = policy_of(enlarged({**values, "last": small.last}, more))
    if unlimited:
        large = replace(large, daily=UNLIMITED, yearly=UNLIMITED)
    assert set(kept(history, small, zone=zone)) <= set(kept(history, large, zone=zone))


@given(histories, fields, zones)
def test_each_snapshot_gets_one_decision_with_reasons(history: list[Made], values: dict[str, Any], zone: Any) -> None:
    decisions = judged(history, policy_of(values), zone=zone)
    assert [one.snapshot for one in decisions] == history
    assert all(one.reasons for one in decisions)


@given(histories, st.sampled_from(["last", "hourly", "daily", "weekly", "monthly", "yearly"]), st.integers(1, 6), zones)
def test_each_numbered_rule_keeps_the_newest_and_no_more_than_its_number(
    history: list[Made], rule: str, number: int, zone: Any
) -> None:
    names = kept(history, only(rule, number), zone=zone)
    for host in ("host", "other"):
        complete = sorted((one.start_ns, one.id) for one in history if one.host == host and one.complete)
        of_group = [name for _, name in complete if name in names]
        assert len(of_group) <= number
        assert len(of_group) == min(number, len(complete)) or rule != "last"
        if complete:
            assert complete[-1][1] in names
        if complete and len(of_group) < number:
            assert complete[0][1] in names


@given(histories, fields, zones)
def test_deciding_again_about_what_was_kept_keeps_it(history: list[Made], values: dict[str, Any], zone: Any) -> None:
    policy = policy_of(values)
    names = kept(history, policy, zone=zone)
    assert kept([one for one in history if one.id in names], policy, zone=zone) == names


@given(histories, fields, zones, st.randoms())
def test_the_order_in_which_snapshots_are_given_does_not_matter(
    history: list[Made], values: dict[str, Any], zone: Any, random: Any
) -> None:
    policy = policy_of(values)
    shuffled = random.sample(history, len(history))
    assert set(kept(history, policy, zone=zone)) == set(kept(shuffled, policy, zone=zone))


@given(histories, fields, zones)
def test_interrupted_ones_change_nothing_for_the_others(history: list[Made], values: dict[str, Any], zone: Any) -> None:
    policy = policy_of(values)
    complete = [one for one in history if one.complete]
    names = set(kept(history, policy, zone=zone))
    assert set(kept(complete, policy, zone=zone)) == names & {one.id for one in complete}
    for one in history:
        if not one.complete:
            later = any(other.host == one.host and other.start_ns > one.start_ns for other in complete)
            assert (one.id in names) is not later


@given(st.lists(st.integers(-(1 << 70), 1 << 70), max_size=4), durations, zones)
def test_any_time_and_duration_can_be_judged(times: list[int], duration: Duration, zone: Any) -> None:
    history = [Made(str(at), time) for at, time in enumerate(times)]
    policy = Policy(hourly=1, weekly=1, within=replace(duration, years=9999, hours=1, days=999_999_999))
    assert kept(history, policy, zone=zone) == [one.id for one in history]


def on_each_day(count: int, **fields: Any) -> list[Made]:
    return made(*[(NOW - timedelta(days=day)).strftime("%Y-%m-%d") for day in reversed(range(count))], **fields)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(daily=7, weekly=4, monthly=12), 7 + 3 + 11),
        (Policy(daily=7), 7),
        (Policy(monthly=UNLIMITED), 13),
    ],
    ids=["usual", "days", "months"],
)
def test_a_year_of_days_is_thinned_out(policy: Policy, expected: int) -> None:
    """Of four weeks and twelve months the newest ends today, which is one of the seven days."""
    snapshots = on_each_day(366)
    names = kept(snapshots, policy)
    assert len(names) == expected
    gaps = [datetime.fromisoformat(after) - datetime.fromisoformat(before) for before, after in pairwise(names)]
    assert max(gaps) <= timedelta(days=31)
