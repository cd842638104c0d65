"""The table of options in docs/centrifugo.md matches the code."""

from __future__ import annotations

import re
from pathlib import Path

from relay.config.loading import SECTIONS
from relay.protocols import door_settings
from relay.protocols.centrifugo.configuration.options import OPTIONS, Option, OptionHandling

ROOT = Path(__file__).parents[5]
TEXT = (ROOT / "docs" / "centrifugo.md").read_text()
_ROW = re.compile(r"^\| `(\w+)` " + r"\|([^|\n]*)" * 4 + r"\|$", re.MULTILINE)
_OURS = re.compile(r"`\[([^]]+)\](?: (\w+))?`")
# All names of options in the wire facts and in Centrifugo's documentation.
DOCUMENTED = """
    name debug admin admin_password admin_secret secret insecure insecure_api insecure_admin
    connection_lifetime watch publish anonymous presence join_leave recover
    history_drop_inactive history_size history_lifetime namespaces max_channel_length
    user_connection_limit node_ping_interval ping_interval node_metrics_interval
    stale_connection_close_delay expired_connection_close_delay client_message_write_timeout
    client_channel_limit client_request_max_size client_queue_max_size
    client_queue_initial_capacity presence_ping_interval presence_expire_interval
    private_channel_prefix namespace_channel_boundary user_channel_boundary
    user_channel_separator client_channel_boundary address port api_port admin_port http_prefix
    web web_path sockjs_url sockjs_heartbeat_delay websocket_compression
    websocket_compression_min_size websocket_compression_level websocket_read_buffer_size
    websocket_write_buffer_size ssl ssl_cert ssl_key ssl_autocert ssl_autocert_host_whitelist
    ssl_autocert_cache_dir ssl_autocert_email ssl_autocert_force_rsa ssl_autocert_server_name
    ssl_autocert_http_addr engine log_level log_file pid_file gomaxprocs redis_host redis_port
    redis_password redis_db redis_url redis_pool redis_api redis_api_num_shards
    redis_master_name redis_sentinels redis_prefix redis_connect_timeout redis_read_timeout
    redis_write_timeout redis_pubsub_num_workers insecure_web
"""


def rows() -> dict[str, tuple[str, str, str, str]]:
    found = _ROW.findall(TEXT)
    assert len(found) == len({row[0] for row in found})
    return {row[0]: tuple(cell.strip() for cell in row[1:]) for row in found}


def ours(option: Option) -> list[tuple[str, str]]:
    pairs = (to.rpartition(".") for to in option.to)
    return [(section or key, key if section else "") for section, _, key in pairs]


def test_both_have_the_same_options_in_the_same_order() -> None:
    assert list(rows()) == list(OPTIONS)


def test_each_row_matches_the_code() -> None:
    for name, (flag, variable, fate, words) in rows().items():
        option = OPTIONS[name]
        short = [f"`-{option.short}`"] if option.short else []
        assert flag.split() == ([*short, f"`--{name}`"] if option.flag else []), name
        assert variable == ("yes" if option.env else ""), name
        assert fate == option.handling.value, name
        named = words.split(";")[0] if option.handling is OptionHandling.MAPPED else ""
        assert _OURS.findall(named) == ours(option), name
        if option.handling is not OptionHandling.MAPPED:
            assert words, f"{name}: why?"


def test_options_are_mapped_to_existing_settings() -> None:
    classes = {**SECTIONS, **door_settings()}
    for option in OPTIONS.values():
        for section, key in ours(option):
            if section in classes:
                assert key in classes[section].model_fields, option.name
            else:
                assert section in {"protocol:centrifugo:NAME", "producer:queue"}, option.name


def test_the_table_contains_all_documented_options() -> None:
    # An option of v1.8.0 that is not documented.
    assert set(OPTIONS) == {*DOCUMENTED.split(), "ssl_autocert_http"}
