#!/bin/sh
# notif_server.sh start|stop|restart|status [CONF_DIR]
#
# Runs the relay in place of Seafile's notification server, by the name that Seafile's manual has for
# it. CONF_DIR is the folder with seafile.conf, $SEAFILE_CENTRAL_CONF_DIR or /opt/seafile/conf without
# it; pids/, logs/ and relay-data/ lie beside it. NOTIF_SERVER_OPTIONS are further options of
# `relay serve`, such as "-c /etc/relay.ini"; without any, what is not Seafile's listens on
# 127.0.0.1:8084, since 8000 is Seahub's.
set -eu

action=${1:-}
conf=${2:-${SEAFILE_CENTRAL_CONF_DIR:-/opt/seafile/conf}}

usage() {
    printf 'usage: %s start|stop|restart|status [CONF_DIR]\n' "$0" >&2
    exit 2
}

case $action in start | stop | restart | status) ;; *) usage ;; esac
[ -d "$conf" ] || {
    printf 'notif_server: %s is no folder: name the one with seafile.conf\n' "$conf" >&2
    exit 1
}
conf=$(CDPATH='' cd -- "$conf" && pwd)
top=$(dirname -- "$conf")
pid_file=$top/pids/notification-server.pid
log=$top/logs/notification-server.log
. "$(dirname -- "$0")/venv"

# The process, if it is there and is a relay: the number may belong to another by now.
running() {
    [ -r "$pid_file" ] || return 1
    pid=$(cat "$pid_file")
    kill -0 "$pid" 2>/dev/null || return 1
    [ ! -r "/proc/$pid/cmdline" ] || tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q ' relay serve '
}

# Whether /ping answers at the address that the configuration names.
answers() {
    "$python" - "$conf" <<'PY'
import os, sys, urllib.request
from pathlib import Path
from relay.protocols.seafile import conf

door = conf.read(Path(sys.argv[1]), os.environ).door
host = door.get("host", "127.0.0.1").replace("0.0.0.0", "127.0.0.1")
try:
    with urllib.request.urlopen(f"http://{host}:{door.get('port', 8083)}/ping", timeout=2) as answer:
        sys.exit(b"pong" not in answer.read())
except OSError:
    sys.exit(1)
PY
}

start() {
    if running; then
        echo "Notification server is already running, process $pid."
        return 0
    fi
    mkdir -p "$top/pids" "$top/logs" "$top/relay-data"
    rm -f "$pid_file"
    # shellcheck disable=SC2086 # they are several words
    nohup "$python" -m relay serve ${NOTIF_SERVER_OPTIONS:---port 8084} --seafile-conf-dir "$conf" \
        --set "node.pid_file=$pid_file" --set "redis.embedded_dir=$top/relay-data" \
        </dev/null >>"$log" 2>&1 &
    child=$!
    waited=0
    until answers; do
        kill -0 "$child" 2>/dev/null || {
            printf 'Notification server did not start; the end of %s:\n' "$log" >&2
            tail -n 5 "$log" >&2
            return 1
        }
        waited=$((waited + 1))
        [ "$waited" -lt 60 ] || {
            printf 'Notification server does not answer /ping; see %s\n' "$log" >&2
            return 1
        }
        sleep 0.5
    done
    echo "Notification server started."
}

stop() {
    if ! running; then
        echo "Notification server is not running."
        return 0
    fi
    kill -TERM "$pid"
    waited=0
    while kill -0 "$pid" 2>/dev/null; do
        waited=$((waited + 1))
        [ "$waited" -lt 120 ] || {
            printf 'Notification server, process %s, does not stop.\n' "$pid" >&2
            return 1
        }
        sleep 0.25
    done
    echo "Notification server stopped."
}

case $action in
start) start ;;
stop) stop ;;
restart)
    stop
    start
    ;;
status)
    if running && answers; then
        echo "Notification server is running, process $pid."
    elif running; then
        echo "Notification server runs, process $pid, but does not answer /ping."
        exit 1
    else
        echo "Notification server is not running."
        exit 3
    fi
    ;;
esac
