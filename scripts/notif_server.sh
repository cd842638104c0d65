#!/bin/sh
# notif_server.sh start|stop|restart|status [CONF_DIR]
#
# Run relay in place of Seafile's notification server. The name of this script is the one used in
# Seafile's manual. CONF_DIR is the folder that contains seafile.conf. The default is
# $SEAFILE_CENTRAL_CONF_DIR, or /opt/seafile/conf. The folders pids, logs and relay-data are created
# next to CONF_DIR:
#
#   logs/notification-server.log  the log; after rotation send SIGUSR1 to the process
#   logs/notification-server.out  output of the last start: the addresses, or an error
#
# NOTIF_SERVER_OPTIONS contains more options for `relay serve`, such as "-c /etc/relay.ini". Without
# it, the protocols other than Seafile's listen on 127.0.0.1:8084, because Seahub uses port 8000.
set -eu

action=${1:-}
conf=${2:-${SEAFILE_CENTRAL_CONF_DIR:-/opt/seafile/conf}}

usage() {
    printf 'usage: %s start|stop|restart|status [CONF_DIR]\n' "$0" >&2
    exit 2
}

case $action in start | stop | restart | status) ;; *) usage ;; esac
[ -d "$conf" ] || {
    printf 'notif_server: %s is not a folder. Specify the folder that contains seafile.conf.\n' "$conf" >&2
    exit 1
}
conf=$(CDPATH='' cd -- "$conf" && pwd)
top=$(dirname -- "$conf")
pid_file=$top/pids/notification-server.pid
log=$top/logs/notification-server.log
out=$top/logs/notification-server.out
. "$(dirname -- "$0")/venv"

# Set $pid from the PID file. Succeed if that process is a running relay. Check its command line,
# because the system may have reused the process ID for another program. kill -0 fails for a process
# of another user, therefore also look in /proc.
running() {
    [ -r "$pid_file" ] || return 1
    pid=$(cat "$pid_file")
    case $pid in '' | *[!0-9]*) return 1 ;; esac
    kill -0 "$pid" 2>/dev/null || [ -d "/proc/$pid" ] || return 1
    [ ! -r "/proc/$pid/cmdline" ] || tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q ' relay serve '
}

# Succeed if /ping responds at the address that relay printed at startup.
answers() {
    address=$(sed -n 's/^  seafile  *//p' "$out" 2>/dev/null | tail -n 1)
    [ -n "$address" ] || address=$(sed -n 's/^relay is ready on //p' "$out" 2>/dev/null | tail -n 1)
    "$python" - "$address/ping" <<'PY'
import ssl, sys, urllib.request

# Skip verification: the certificate is not issued for 127.0.0.1.
context = ssl._create_unverified_context()
try:
    with urllib.request.urlopen(sys.argv[1], timeout=5, context=context) as answer:
        sys.exit(b"pong" not in answer.read())
except (OSError, ValueError):
    sys.exit(1)
PY
}

# end PID SECONDS: send SIGTERM to the process. Fail if it is still running after SECONDS.
end() {
    kill -TERM "$1" 2>/dev/null || true
    waited=0
    while kill -0 "$1" 2>/dev/null; do
        waited=$((waited + 1))
        [ "$waited" -lt "$(($2 * 4))" ] || return 1
        sleep 0.25
    done
}

# failed REASON: print the reason and the last lines of relay's output.
failed() {
    printf 'Notification server did not start: %s\n' "$1" >&2
    tail -n 5 "$out" >&2
    return 1
}

start() {
    mkdir -p "$top/pids" "$top/logs" "$top/relay-data"
    # A second `start` at the same time waits for the lock. It then finds relay running.
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
    # shellcheck disable=SC2086 # NOTIF_SERVER_OPTIONS is split into words
    nohup "$python" -m relay serve --set "log.file=$log" ${NOTIF_SERVER_OPTIONS:---port 8084} \
        --seafile-conf-dir "$conf" --set "node.pid_file=$pid_file" \
        --set "redis.embedded_dir=$top/relay-data" </dev/null >>"$out" 2>&1 8>&- &
    child=$!
    waited=0
    # Relay prints this line once it listens. Don't check /ping before that: another server that
    # uses the port may respond.
    until grep -q '^relay is ready on ' "$out"; do
        kill -0 "$child" 2>/dev/null || {
            failed "relay exited during startup; see also $log"
            return 1
        }
        waited=$((waited + 1))
        [ "$waited" -lt 120 ] || {
            end "$child" 10 || kill -KILL "$child" 2>/dev/null || true
            failed "relay was not ready after 60 seconds and was stopped; see $log"
            return 1
        }
        sleep 0.5
    done
    answers || {
        end "$child" 30 || kill -KILL "$child" 2>/dev/null || true
        failed "relay was stopped because /ping does not respond; is Seafile disabled (enabled = false)? See $log"
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
        printf 'Notification server, process %s, did not stop within 45 seconds.\n' "$pid" >&2
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
        echo "Notification server is running, process $pid, but does not respond to /ping."
        exit 1
    else
        echo "Notification server is not running."
        exit 3
    fi
    ;;
esac
