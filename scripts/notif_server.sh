#!/bin/sh
# notif_server.sh start|stop|restart|status [CONF_DIR]
#
# Runs the relay in place of Seafile's notification server, under the name that Seafile's manual uses.
# CONF_DIR is the folder with seafile.conf. Without it $SEAFILE_CENTRAL_CONF_DIR or /opt/seafile/conf
# is used. The folders pids, logs and relay-data are beside it:
#
#   logs/notification-server.log  the log; after rotation send SIGUSR1 to the process
#   logs/notification-server.out  what the last start printed: its addresses, or why it failed
#
# NOTIF_SERVER_OPTIONS are further options of `relay serve`, such as "-c /etc/relay.ini". Without them
# all other protocols listen on 127.0.0.1:8084, because 8000 is Seahub's port.
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
out=$top/logs/notification-server.out
. "$(dirname -- "$0")/venv"

# Sets $pid and succeeds if that process is a relay. The number may have been given to another
# program since. A process of another user cannot be signalled, but it exists in /proc.
running() {
    [ -r "$pid_file" ] || return 1
    pid=$(cat "$pid_file")
    case $pid in '' | *[!0-9]*) return 1 ;; esac
    kill -0 "$pid" 2>/dev/null || [ -d "/proc/$pid" ] || return 1
    [ ! -r "/proc/$pid/cmdline" ] || tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q ' relay serve '
}

# Succeeds if /ping answers at the address that the relay has printed.
answers() {
    address=$(sed -n 's/^  seafile  *//p' "$out" 2>/dev/null | tail -n 1)
    [ -n "$address" ] || address=$(sed -n 's/^relay is ready on //p' "$out" 2>/dev/null | tail -n 1)
    "$python" - "$address/ping" <<'PY'
import ssl, sys, urllib.request

# The name in the certificate is not 127.0.0.1.
context = ssl._create_unverified_context()
try:
    with urllib.request.urlopen(sys.argv[1], timeout=5, context=context) as answer:
        sys.exit(b"pong" not in answer.read())
except (OSError, ValueError):
    sys.exit(1)
PY
}

# end PROCESS SECONDS: stops it; fails if it is still there after so long.
end() {
    kill -TERM "$1" 2>/dev/null || true
    waited=0
    while kill -0 "$1" 2>/dev/null; do
        waited=$((waited + 1))
        [ "$waited" -lt "$(($2 * 4))" ] || return 1
        sleep 0.25
    done
}

# failed REASON: says why, and what the relay has printed.
failed() {
    printf 'Notification server did not start: %s\n' "$1" >&2
    tail -n 5 "$out" >&2
    return 1
}

start() {
    mkdir -p "$top/pids" "$top/logs" "$top/relay-data"
    # A second start at the same time waits, and then finds the first one running.
    if command -v flock >/dev/null 2>&1; then
        exec 8>"$top/pids/notification-server.lock"
        flock 8
    fi
    if running; then
        echo "Notification server is already running, process $pid."
        return 0
    fi
    rm -f "$pid_file"
    : >"$out"
    # shellcheck disable=SC2086 # they are several words
    nohup "$python" -m relay serve --set "log.file=$log" ${NOTIF_SERVER_OPTIONS:---port 8084} \
        --seafile-conf-dir "$conf" --set "node.pid_file=$pid_file" \
        --set "redis.embedded_dir=$top/relay-data" </dev/null >>"$out" 2>&1 8>&- &
    child=$!
    waited=0
    # The relay prints this once it listens. Whether /ping answers says nothing before: another
    # server may have the port.
    until grep -q '^relay is ready on ' "$out"; do
        kill -0 "$child" 2>/dev/null || {
            failed "the relay has ended, see also $log"
            return 1
        }
        waited=$((waited + 1))
        [ "$waited" -lt 120 ] || {
            end "$child" 10 || kill -KILL "$child" 2>/dev/null || true
            failed "not ready after 60 seconds, so it was stopped; see $log"
            return 1
        }
        sleep 0.5
    done
    answers || {
        end "$child" 30 || kill -KILL "$child" 2>/dev/null || true
        failed "the relay does not serve Seafile, so it was stopped (enabled = false?); see $log"
        return 1
    }
    echo "Notification server started."
}

stop() {
    if ! running; then
        echo "Notification server is not running."
        return 0
    fi
    end "$pid" 45 || {
        printf 'Notification server, process %s, does not stop.\n' "$pid" >&2
        return 1
    }
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
