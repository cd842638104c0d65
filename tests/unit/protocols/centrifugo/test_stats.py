"""v1's names of metrics, and the calculation of its histograms."""

from __future__ import annotations

from relay.protocols.centrifugo.stats import COUNTERS, GAUGES, DurationHistogram, Stats

# The names in Centrifugo's documentation (server/stats.md), and five that it does not contain.
DOCUMENTED = """
client_api_num_requests client_bytes_in client_bytes_out client_num_connect
client_num_msg_published client_num_msg_queued client_num_msg_sent client_num_subscribe
http_api_num_requests http_raw_ws_num_requests http_sockjs_num_requests node_cpu_usage
node_memory_sys node_num_add_client_conn node_num_add_client_sub node_num_add_presence
node_num_admin_msg_published node_num_admin_msg_received node_num_channels
node_num_client_msg_published node_num_client_msg_received node_num_clients
node_num_control_msg_published node_num_control_msg_received node_num_goroutine node_num_history
node_num_join_msg_published node_num_join_msg_received node_num_last_message_id
node_num_leave_msg_published node_num_leave_msg_received node_num_presence
node_num_remove_client_conn node_num_remove_client_sub node_num_remove_presence
node_num_unique_clients node_uptime_seconds
node_memory_heap_alloc node_memory_heap_sys node_memory_stack_inuse node_rusage_stime
node_rusage_utime
"""
HISTOGRAM = ("count", *(f"microseconds_{each}" for each in ("max", "mean", "min")))
QUANTILES = tuple(f"microseconds_{each}%ile" for each in ("50", "90", "99", "99.99"))


def test_all_metrics_exist() -> None:
    names = [*COUNTERS, *GAUGES, *Stats().durations()]
    histograms = [
        f"{api}_{windows}_{what}"
        for api in ("client_api", "http_api")
        for windows in (1, 15)
        for what in (*HISTOGRAM, *QUANTILES)
    ]
    assert sorted(names) == sorted([*DOCUMENTED.split(), *histograms])
    assert len(names) == 74


def test_durations_over_one_interval_and_over_fifteen() -> None:
    durations = DurationHistogram("http_api")
    assert set(durations.values().values()) == {0}
    for microseconds in range(1, 101):
        durations.record(microseconds / 1e6 + 1e-9)
    durations.rotate()
    durations.record(0.123456)
    found = durations.values()
    one = {name: found[f"http_api_1_{name}"] for name in (*HISTOGRAM, *QUANTILES)}
    # Three digits are significant.
    assert one == {"count": 1} | dict.fromkeys((*HISTOGRAM[1:], *QUANTILES), 123000)
    fifteen = {name: found[f"http_api_15_{name}"] for name in (*HISTOGRAM, *QUANTILES)}
    assert fifteen == {
        "count": 101,
        "microseconds_max": 123000,
        "microseconds_min": 1,
        "microseconds_mean": (5050 + 123000) // 101,
        "microseconds_50%ile": 51,
        "microseconds_90%ile": 91,
        "microseconds_99%ile": 100,
        "microseconds_99.99%ile": 123000,
    }
    for _ in range(14):
        durations.rotate()
    assert durations.values()["http_api_15_count"] == 1
    durations.rotate()
    assert durations.values()["http_api_15_count"] == 0
