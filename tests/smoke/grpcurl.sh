#!/usr/bin/env bash
# Asks a running daemon, with grpcurl, for everything a caller can ask for, and checks the answers.
#
#   grpcurl.sh [FLAG...] [TARGET]         TARGET: unix:PATH or HOST:PORT. Default: $HOTGRAPH_TARGET, else unix:hotgraph.sock
#
#   --tls                    TLS, by the system's authorities   --tls-server-name NAME   the name in the certificate
#   --tls-ca FILE            TLS, by this authority's PEM       --token-file FILE        the bearer token; an admin's
#   --tls-cert FILE          our certificate, for mutual TLS    --admin-target TARGET    where admin_listen serves the admin
#   --tls-key FILE           its key                            --expect-model NAME      the model that must be served
#                                                               --expect-version VERSION the version that must serve it
#
# Each flag is also a variable, the same as the command line's: HOTGRAPH_TLS_CA, HOTGRAPH_TOKEN_FILE, HOTGRAPH_EXPECT_MODEL, ...
# Unix sockets speak no TLS, so those flags leave them alone. More settings are in the README beside this file.
#
# One line a check: `ok NAME`, `FAIL NAME` (what came instead follows on standard error) or `skip NAME: why`. Exit status:
# 0 all passed, 1 a check failed or no daemon answers, 2 wrong usage or no grpcurl. It needs grpcurl, coreutils and the bash
# (4.3 or newer) that runs it; no JSON tool. The daemon is left as it was, but that it has captured some graphs.
#
# Run it after an upgrade, or have systemd do so, as a drop-in of hotgraph.service; a start is then over when all has passed:
#
#   [Service]
#   Environment=GRPCURL=/opt/hotgraph/bin/grpcurl
#   ExecStartPost=/opt/hotgraph/bin/grpcurl.sh unix:/run/hotgraph/hotgraph.sock
#
# Read it to see how a call looks.
set -uo pipefail
export LC_ALL=C.UTF-8

usage() {
    local line
    while IFS= read -r line && [[ $line == \#* ]]; do
        [[ $line == "#!"* ]] || echo "${line#"#"}"
    done <"${BASH_SOURCE[0]}" | cut -c 2-
}
wrong_usage() { echo "grpcurl.sh: $1 (--help tells how it is called)" >&2; exit 2; }

# ---- How to reach the daemon ----------------------------------------------------------------------------------------

target=${HOTGRAPH_TARGET:-unix:hotgraph.sock}
has_target=
declare -A setting=(
    [tls]=${HOTGRAPH_TLS:-} [tls-ca]=${HOTGRAPH_TLS_CA:-} [tls-cert]=${HOTGRAPH_TLS_CERT:-} [tls-key]=${HOTGRAPH_TLS_KEY:-}
    [tls-server-name]=${HOTGRAPH_TLS_SERVER_NAME:-} [token-file]=${HOTGRAPH_TOKEN_FILE:-}
    [admin-target]=${HOTGRAPH_ADMIN_TARGET:-} [expect-model]=${HOTGRAPH_EXPECT_MODEL:-}
    [expect-version]=${HOTGRAPH_EXPECT_VERSION:-}
)
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --tls) setting[tls]=yes ;;
        --*)
            [[ -v "setting[${1#--}]" ]] || wrong_usage "there is no $1"
            [ $# -ge 2 ] || wrong_usage "$1 wants a value"
            setting[${1#--}]=$2
            shift
            ;;
        *)
            [ -z "$has_target" ] || wrong_usage "one target, not $target and $1"
            target=$1 has_target=yes
            ;;
    esac
    shift
done
[ -z "${setting[tls-cert]}" ] && [ -n "${setting[tls-key]}" ] && wrong_usage "--tls-key wants --tls-cert"
[ -n "${setting[tls-cert]}" ] && [ -z "${setting[tls-key]}" ] && wrong_usage "--tls-cert wants --tls-key"
for name in tls-ca tls-cert tls-key token-file; do
    [ -z "${setting[$name]}" ] || [ -r "${setting[$name]}" ] || wrong_usage "--$name: ${setting[$name]} cannot be read"
done

here=${BASH_SOURCE[0]%/*}
[ "$here" != "${BASH_SOURCE[0]}" ] || here=.
grpcurl=${GRPCURL:-}
for candidate in "$(command -v grpcurl || true)" "$here/grpcurl" "$here/../../.tools/bin/grpcurl"; do
    [ -z "$grpcurl" ] && [ -n "$candidate" ] && [ -x "$candidate" ] && grpcurl=$candidate
done
if [ -z "$grpcurl" ] || [ ! -x "$grpcurl" ]; then
    echo "no grpcurl: tests/smoke/install_grpcurl.sh builds it; or set GRPCURL to its path" >&2
    exit 2
fi

flags=(-connect-timeout "${SMOKE_CONNECT_SECONDS:-10}" -max-time "${SMOKE_MAX_SECONDS:-60}")
read -r -a more <<<"${GRPCURL_FLAGS:-}"
if [ -n "${setting[token-file]}" ]; then
    # grpcurl reads the token from its environment: it is in no list of processes.
    HOTGRAPH_SMOKE_TOKEN=$(<"${setting[token-file]}")
    export HOTGRAPH_SMOKE_TOKEN
    # shellcheck disable=SC2016  # grpcurl expands it
    flags+=(-expand-headers -H 'authorization: Bearer ${HOTGRAPH_SMOKE_TOKEN}')
fi
tls=()
[ -n "${setting[tls-ca]}" ] && tls+=(-cacert "${setting[tls-ca]}")
[ -n "${setting[tls-cert]}" ] && tls+=(-cert "${setting[tls-cert]}" -key "${setting[tls-key]}")
[ -n "${setting[tls-server-name]}" ] && tls+=(-servername "${setting[tls-server-name]}")
is_tls=
if [ -n "${setting[tls]}" ] || [ ${#tls[@]} -gt 0 ]; then is_tls=yes; fi

# How grpcurl is told of a target: `reach TARGET` fills `transport` and `address`.
reach() {
    address=$1 transport=()
    if [[ $1 == unix:* ]]; then
        address=${1#unix:}
        # Of a relative path grpcurl takes the first part for a host.
        [[ $address == /* ]] || address=$PWD/$address
        transport=(-plaintext -unix)
    elif [ -n "$is_tls" ]; then
        transport=("${tls[@]}")
    elif [ -n "${setting[token-file]}" ] && [[ ! $1 =~ ^(localhost|127\.[0-9.]+|\[::1\]):[0-9]+$ ]]; then
        wrong_usage "the token would go to $1 in the clear: add --tls or --tls-ca"
    else
        transport=(-plaintext)
    fi
}

reach "${setting[admin-target]:-$target}"
admin_transport=("${transport[@]}") admin_address=$address
reach "$target"

# ---- How a check reads ----------------------------------------------------------------------------------------------
#
#   call METHOD [JSON]           sends it; keeps what came, and grpcurl's exit status (64 + the gRPC code)
#   call_admin METHOD [JSON]     the same, to where the admin's methods are served
#   stream METHOD [JSON]         the same, for a method that answers with a stream
#   watch SECONDS METHOD [JSON]  the same, for one that does not end: what came in so many seconds
#   shows NAME TEXT...           the check NAME: the call went well and every TEXT is in what came
#   holds NAME [PATH TEST VALUE]...   the check NAME: the call went well and all of these hold of what came
#   fails NAME CODE TEXT...      the check NAME: the call ended with this gRPC code, and every TEXT is in the error
#
# A PATH is that of a value in the JSON: `choices.0.finish.reason`; of a stream each message is under its number: `3.tokens.text`.
# `choices.#` is how many there are; a list of numbers or strings is one value with commas; what is not there is empty, and 0 as a
# number. With a `*` in it, it has to hold for every path that fits, and at least one must. A TEST is == or != (of text), =~ (a
# regular expression), one of bash's -eq -ge -gt -le -lt (of numbers), or `has`: among all that fit, one matches the pattern.

output=
status=0
num_passed=0
num_failed=0
declare -A answer=() # path -> value, as it stands in the JSON but for the quotes around it

passed() { echo "ok $1"; num_passed=$((num_passed + 1)); }
skipped() { echo "skip $1: $2"; }
failed() {
    echo "FAIL $1"
    num_failed=$((num_failed + 1))
    {
        echo "  $2"
        echo "  grpcurl ended with status $status and said:"
        local line num_lines=0
        while IFS= read -r line && [ $((num_lines++)) -lt 60 ]; do echo "  | $line"; done <<<"$output"
    } >&2
}

ask() { output=$("$grpcurl" "${flags[@]}" "${more[@]}" "$@" 2>&1); status=$?; }
call() { ask "${transport[@]}" -d "${2:-{\}}" "$address" "$1"; parse; }
call_admin() { ask "${admin_transport[@]}" -d "${2:-{\}}" "$admin_address" "$1"; parse; }
stream() { ask "${transport[@]}" -d "${2:-{\}}" "$address" "$1"; parse stream; }
watch() {
    ask "${transport[@]}" -max-time "$1" -d "${3:-{\}}" "$address" "$2"
    # It goes on until the caller leaves: that the time was over (DEADLINE_EXCEEDED) is how it ends.
    [ "$status" -ne 68 ] || status=0
    parse stream
}
list() { ask "${transport[@]}" "$address" list "$@"; }
describe() { ask "${transport[@]}" "$address" describe "$@"; }

# Fills `answer` from the JSON in `output`, which grpcurl prints with one value, bracket or brace a line.
parse() {
    local line key value path='' num_messages=0 depth=0
    local -a paths=() counts=('')
    answer=()
    while IFS= read -r line; do
        line=${line#"${line%%[! ]*}"} line=${line%,}
        [[ $line != ERROR:* ]] || break
        [[ $depth -gt 0 || $line == '{' ]] || continue # no JSON
        case $line in
            '}' | ']')
                [ -z "${counts[depth]}" ] || answer[${path}#]=${counts[depth]}
                depth=$((depth - 1)) path=${paths[depth]}
                continue
                ;;
        esac
        key='' value=$line
        if [[ $line =~ ^\"([^\"]*)\":\ *(.*)$ ]]; then
            key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
        elif [ "$depth" -gt 0 ]; then # of a list
            key=${counts[depth]}
            counts[depth]=$((counts[depth] + 1))
        elif [ "${1:-}" = stream ]; then
            key=$((num_messages++))
        fi
        case $value in
            '{' | '[')
                paths[depth]=$path depth=$((depth + 1))
                path+=${key:+$key.}
                counts[depth]=
                [ "$value" = '{' ] || counts[depth]=0
                ;;
            *)
                value=${value#\"} value=${value%\"}
                answer[$path$key]=$value
                # Of a list, all its values together.
                [ -z "${counts[depth]}" ] || answer[${path%.}]+=${answer[${path%.}]:+,}$value
                ;;
        esac
    done <<<"$output"
    [ "${1:-}" != stream ] || answer[#]=$num_messages
}

# All values at a path of a stream's messages, in order, with $2 between them.
joined() {
    local i value all=''
    for ((i = 0; i < ${answer[#]}; i++)); do
        value=${answer[$i.$1]:-}
        all+=${all:+${value:+${2:-}}}$value
    done
    printf %s "$all"
}

# Whether VALUE TEST VALUE holds.
is_so() {
    local found=$1
    case $2 in
        ==) [[ $found == "$3" ]] ;;
        !=) [[ $found != "$3" ]] ;;
        =~) [[ $found =~ $3 ]] ;;
        has) # shellcheck disable=SC2053  # a pattern
            [[ $found == $3 ]] ;;
        *) [[ ${found:-0} =~ ^-?[0-9]+$ ]] && test "${found:-0}" "$2" "$3" ;;
    esac
}

# Sets `why` when it does not hold.
is_held() {
    local path=$1 key num_fitting=0 num_so=0
    if [[ $path != *'*'* ]]; then
        why="$path is '${answer[$path]:-}', not $2 '$3'"
        is_so "${answer[$path]:-}" "$2" "$3"
        return
    fi
    for key in "${!answer[@]}"; do
        # shellcheck disable=SC2053  # a pattern
        [[ $key == $path ]] || continue
        num_fitting=$((num_fitting + 1))
        if is_so "${answer[$key]}" "$2" "$3"; then
            num_so=$((num_so + 1))
        elif [ "$2" != has ]; then
            why="$key is '${answer[$key]}', not $2 '$3'"
            return 1
        fi
    done
    why="of $num_fitting at $path none is $2 '$3'"
    [ "$num_so" -gt 0 ]
}

shows() {
    local name=$1 text
    shift
    if [ "$status" -ne 0 ]; then failed "$name" "the call failed"; return; fi
    for text in "$@"; do
        if [[ $output != *"$text"* ]]; then failed "$name" "missing: $text"; return; fi
    done
    passed "$name"
}

holds() {
    local name=$1 why=
    shift
    if [ "$status" -ne 0 ]; then failed "$name" "the call failed"; return; fi
    while [ $# -gt 0 ]; do
        if ! is_held "$1" "$2" "$3"; then failed "$name" "$why"; return; fi
        shift 3
    done
    passed "$name"
}

fails() {
    local name=$1 code=$2 text line # the details are shown, decoded, on standard error
    shift 2
    if [ "$status" -eq 0 ]; then failed "$name" "the call went well, expected $code"; return; fi
    for text in "Code: $code" "$@"; do
        if [[ $output != *"$text"* ]]; then failed "$name" "missing: $text"; return; fi
    done
    passed "$name"
    while IFS= read -r line; do echo "  | $line"; done <<<"$output" >&2
}

inference=hotgraph.v1.InferenceService
graph=hotgraph.v1.GraphService
admin=hotgraph.v1.AdminService

# ---- Reflection: what the daemon offers, told by itself ---------------------------------------------------------------

list
shows "list services" "$inference" "$graph" "$admin" grpc.health.v1.Health \
    grpc.reflection.v1.ServerReflection grpc.reflection.v1alpha.ServerReflection
if [ "$status" -ne 0 ]; then
    echo "no daemon answers at $target, or it does not let us in: the other checks are left out" >&2
    exit 1
fi

list "$inference"
shows "list methods" "$inference.Generate" "$inference.Complete" "$inference.Tokenize" "$inference.GetModel"

describe "$inference"
shows "describe a service" "rpc Generate ( .hotgraph.v1.GenerateRequest ) returns ( stream .hotgraph.v1.GenerateResponse );"

describe "$inference.Generate"
shows "describe a method" "is a method:" "rpc Generate ( .hotgraph.v1.GenerateRequest ) returns ( stream .hotgraph.v1.GenerateResponse );"

describe hotgraph.v1.GenerateRequest
shows "describe a message" "oneof prompt" ".hotgraph.v1.ChatPrompt chat" "optional uint32 max_tokens"

describe hotgraph.v1.GraphState
shows "describe an enum" "GRAPH_STATE_READY = 3;"

# ---- Health: is it ready for work? --------------------------------------------------------------------------------------

call grpc.health.v1.Health/Check '{}'
holds "health, overall" status == SERVING

for service in "$inference" "$graph" "$admin"; do
    call grpc.health.v1.Health/Check "{\"service\": \"$service\"}"
    holds "health of $service" status == SERVING
done

# The captures of the start run beside the first requests: after them it is warm.
for ((waited = 0; waited <= ${SMOKE_WARM_SECONDS:-120}; waited++)); do
    call grpc.health.v1.Health/Check '{"service": "hotgraph.warm"}'
    [ "${answer[status]:-}" = NOT_SERVING ] || break
    sleep 1
done
holds "health of hotgraph.warm" status == SERVING

call grpc.health.v1.Health/Check '{"service": "no.such.Service"}'
fails "health of what is not there" NotFound SERVICE_NOT_FOUND

watch 2 grpc.health.v1.Health/Watch
holds "health, watched" 0.status == SERVING

# ---- What it is and does ------------------------------------------------------------------------------------------------

call_admin "$admin/GetStatus"
holds "GetStatus" state == DAEMON_STATE_SERVING version != '' model != '' scheduler.num_slots -gt 0 kv_cache.num_blocks -gt 0
num_blocks=0
for kind in free cached used; do num_blocks=$((num_blocks + ${answer[kv_cache.num_${kind}_blocks]:-0})); done
holds "GetStatus adds up" kv_cache.num_blocks -gt 0 kv_cache.num_blocks -eq "$num_blocks"
if [ -n "${setting[expect-version]}" ]; then
    holds "the version is ${setting[expect-version]}" version == "${setting[expect-version]}"
fi

call "$inference/ListModels"
holds "ListModels" models.# -ge 1 'models.*.name' =~ ^models/.

call "$inference/GetModel"
holds "GetModel" model.context_length -gt 0 model.vocabulary_size -gt 0 model.dtype != '' model.device != ''
if [ -n "${setting[expect-model]}" ]; then
    holds "the model is ${setting[expect-model]}" model.id == "${setting[expect-model]}"
fi
has_chat=${answer[model.chat_template]:-}

call_admin "$admin/ListClients" '{"page_size": 1000}'
holds "ListClients" 'clients.*.user_agent' has '*grpcurl*'

# ---- Text and tokens ----------------------------------------------------------------------------------------------------

call "$inference/Tokenize" '{"text": "Hello, world!", "add_special_tokens": false}'
holds "Tokenize" token_ids.# -gt 0 pieces.# -eq "${answer[token_ids.#]:-0}"
ids=${answer[token_ids]:-}
text=
for ((i = 0; i < ${answer[pieces.#]:-0}; i++)); do text+=$(base64 -d <<<"${answer[pieces.$i]}"; echo .); text=${text%.}; done
answer[text]=${text# }
holds "Tokenize, the bytes of each token" text == "Hello, world!"

call "$inference/Detokenize" "{\"token_ids\": [$ids]}"
holds "Detokenize" text =~ '^ ?Hello, world!$'

# ---- Complete: all of it in one answer ------------------------------------------------------------------------------------

greedy='"sampling": {"temperature": 0}'
length='"max_tokens": 12, "stop": {"ignore_eos": true}'

call "$inference/Complete" "{\"text\": \"The capital of France is\", $greedy, $length}"
holds "Complete, text" choices.0.token_ids.# -eq 12 choices.0.text != '' \
    choices.0.finish.reason == FINISH_REASON_LENGTH usage.completion_tokens -eq 12
num_steps=0
for ((i = 0; i < ${answer[receipt.step_groups.#]:-0}; i++)); do
    num_steps=$((num_steps + ${answer[receipt.step_groups.$i.num_steps]:-0}))
done
holds "Complete, receipt" receipt.num_steps -gt 0 receipt.num_steps -eq "$num_steps" \
    receipt.num_steps -eq $((${answer[receipt.num_graph_steps]:-0} + ${answer[receipt.num_eager_steps]:-0}))
holds "Complete, timings" timings.time_to_first_token =~ '^[0-9.]+s$' timings.total =~ '^[0-9.]+s$' timings.decode =~ '^[0-9.]+s$'
greedy_ids=${answer[choices.0.token_ids]:-}
greedy_text=${answer[choices.0.text]:-}

call "$inference/Tokenize" '{"text": "The capital of France is"}'
call "$inference/Complete" "{\"token_ids\": {\"ids\": [${answer[token_ids]:-}]}, $greedy, $length}"
holds "Complete, token ids, as the same text" choices.0.token_ids.# -eq 12 choices.0.token_ids == "$greedy_ids"

if [ -n "$has_chat" ] && [ "$has_chat" != false ]; then
    question='{"role": "CHAT_ROLE_USER", "content": "What is the capital of France?"}'
    call "$inference/Complete" "{\"chat\": {\"messages\": [$question]}, $greedy, \"max_tokens\": 24}"
    holds "Complete, chat" choices.0.text =~ '[^ ]' usage.prompt_tokens -gt 0 \
        choices.0.finish.reason =~ '^FINISH_REASON_(STOP|LENGTH)$'
    echo "  the model answers: ${answer[choices.0.text]:-}" >&2
else
    skipped "Complete, chat" "the model has no chat template"
fi

call "$inference/Complete" "{\"text\": \"Once upon a time\", $length, \"num_choices\": 2}"
holds "Complete, two choices" choices.# -eq 2 choices.0.index -eq 0 choices.1.index -eq 1 usage.completion_tokens -eq 24

seeded='{"text": "Once upon a time", "sampling": {"temperature": 1, "seed": 7}, "max_tokens": 12, "stop": {"ignore_eos": true}}'
call "$inference/Complete" "$seeded"
holds "Complete, seeded" seed == 7 choices.0.token_ids.# -eq 12
seeded_ids=${answer[choices.0.token_ids]:-}
call "$inference/Complete" "$seeded"
holds "Complete, the same seed gives the same tokens" choices.0.token_ids.# -eq 12 choices.0.token_ids == "$seeded_ids"

call "$inference/Complete" "{\"text\": \"The capital of France is\", $greedy, $length, \"output\": {\"logprobs\": 3}}"
holds "Complete, log-probabilities" choices.0.logprobs.# -eq 12 'choices.0.logprobs.*.top.#' -eq 3 \
    'choices.0.logprobs.*.logprob' =~ '^(-|0)'
likeliest=
for ((i = 0; i < ${answer[choices.0.logprobs.#]:-0}; i++)); do
    likeliest+=${likeliest:+,}${answer[choices.0.logprobs.$i.top.0.token_id]:-0}
done
holds "Complete, greedy is the likeliest" choices.0.token_ids.# -eq 12 choices.0.token_ids == "$likeliest"
holds "Complete, log-probabilities change no token" choices.0.token_ids.# -eq 12 choices.0.token_ids == "$greedy_ids"

# A stop string: some letters from the middle of what the model says here anyway. JSON's escapes are no letters.
plain() { local text=${1//\\u????/ }; printf %s "${text//\\?/ }"; }
said=$(plain "$greedy_text")
[[ ${said:${#said}/2} =~ [[:alnum:]]{1,4} ]]
stop=${BASH_REMATCH[0]:-${said:0:1}}
call "$inference/Complete" "{\"text\": \"The capital of France is\", $greedy, \"max_tokens\": 12,
    \"stop\": {\"ignore_eos\": true, \"strings\": [\"$stop\"]}}"
answer[choices.0.text]=$(plain "${answer[choices.0.text]:-}")
holds "Complete, stop string" choices.0.text == "${said%%"$stop"*}" \
    choices.0.finish.reason == FINISH_REASON_STOP choices.0.finish.stop_string == "$stop"

# ---- Generate: the same, as it is made ------------------------------------------------------------------------------------

stream "$inference/Generate" "{\"text\": \"The capital of France is\", $greedy, $length, \"request_id\": \"smoke-$$\"}"
last=$((${answer[#]} - 1))
num_token_events=0
for ((i = 1; i < last; i++)); do [ -z "${answer[$i.tokens.token_ids]:-}" ] || num_token_events=$((num_token_events + 1)); done
holds "Generate, started first and finished last" '#' -ge 3 0.started.request_id == "smoke-$$" \
    "$last.finished.choices.0.reason" == FINISH_REASON_LENGTH '#' -eq $((num_token_events + 2))
answer[ids]=$(joined tokens.token_ids ,) answer[text]=$(joined tokens.text)
holds "Generate, the tokens of Complete" ids != '' ids == "$greedy_ids"
holds "Generate, the text of Complete" text != '' text == "$greedy_text"
holds "Generate, receipt" "$last.finished.receipt.num_steps" -gt 0 "$last.finished.usage.completion_tokens" -eq 12

# ---- The graph cache ------------------------------------------------------------------------------------------------------

one_token='{"keys": [{"tokens": 1, "rows": 1, "sampler": "SAMPLER_VARIANT_GREEDY"}], "wait": "30s"}'
call_admin "$graph/PrewarmGraphs" "$one_token"
holds "PrewarmGraphs" graphs.# -eq 1 graphs.0.state == GRAPH_STATE_READY graphs.0.name =~ ^graphs/.
name=${answer[graphs.0.name]:-}

call "$graph/ListGraphs" '{"page_size": 1000}'
num_graphs=${answer[total_size]:-0}
[ "$num_graphs" -le 1000 ] || num_graphs=1000
holds "ListGraphs" 'graphs.*.name' has "$name" graphs.# -eq "$num_graphs" 'graphs.*.key.tokens' -ge 1 'graphs.*.key.rows' -ge 1

call "$graph/GetGraph" "{\"name\": \"$name\"}"
holds "GetGraph" graph.name == "$name" graph.key.tokens -eq 1 graph.state == GRAPH_STATE_READY

call_admin "$graph/PinGraph" "{\"name\": \"$name\", \"lease\": \"60s\"}"
holds "PinGraph" graph.name == "$name" graph.pin.expire_time =~ Z$

call_admin "$graph/EvictGraph" "{\"name\": \"$name\"}"
fails "EvictGraph of a pinned one" FailedPrecondition NOT_POSSIBLE

call_admin "$graph/UnpinGraph" "{\"name\": \"$name\"}"
holds "UnpinGraph" graph.name =~ ^graphs/. graph.name == "$name" graph.pin.expire_time == ''

call_admin "$graph/EvictGraph" "{\"name\": \"$name\"}"
holds "EvictGraph" graph.name == "$name" graph.state == GRAPH_STATE_EVICTED

call_admin "$graph/PrewarmGraphs" "$one_token"
holds "PrewarmGraphs brings it back" graphs.0.name == "$name" graphs.0.state == GRAPH_STATE_READY

watch 2 "$graph/WatchGraphs" '{"after_sequence": "0"}'
holds "WatchGraphs, what happened and in which order" '*.event.sequence' -gt 0 '*.event.type' has GRAPH_EVENT_TYPE_EVICTED \
    '*.event.type' has GRAPH_EVENT_TYPE_PUBLISHED '*.event.type' has GRAPH_EVENT_TYPE_PINNED \
    '*.event.type' has GRAPH_EVENT_TYPE_UNPINNED '*.event.graph.name' has "$name"

call "$graph/GetBudget"
holds "GetBudget" budget.limit_bytes -gt 0 budget.used_bytes -le "${answer[budget.limit_bytes]:-0}"
limit_bytes=${answer[budget.limit_bytes]:-0}

call_admin "$graph/UpdateBudget" "{\"budget\": {\"limit_bytes\": \"$limit_bytes\"}, \"update_mask\": {\"paths\": [\"limit_bytes\"]}}"
holds "UpdateBudget, to what it was" budget.limit_bytes -gt 0 budget.limit_bytes -eq "$limit_bytes" evicted_graphs.# -eq 0

call "$graph/ExportProfile"
holds "ExportProfile" profile.entries.# -ge 1 profile.model != ''

# ---- Errors: the code, the reason for programs, and what to do about it -----------------------------------------------------

call "$inference/Complete" '{"text": "Hello", "sampling": {"temperature": -1, "top_p": 2}, "max_tokens": 0}'
fails "every wrong field is named" InvalidArgument INVALID_REQUEST google.rpc.ErrorInfo google.rpc.BadRequest hotgraph \
    sampling.temperature sampling.top_p max_tokens

call "$inference/Complete" '{"text": "Hello", "model": "no-such-model"}'
fails "unknown model" NotFound MODEL_NOT_FOUND google.rpc.ResourceInfo no-such-model

call "$graph/GetGraph" '{"name": "graphs/no-such-graph"}'
fails "unknown graph" NotFound GRAPH_NOT_FOUND google.rpc.ResourceInfo

call "$inference/Complete" '{"text": "Hello", "max_tokens": 100000000}'
fails "more than the context holds" InvalidArgument CONTEXT_LENGTH

call "$inference/Complete" "{\"text\": \"The capital of France is\", $greedy, $length}"
holds "after all that it answers as before" choices.0.token_ids.# -eq 12 choices.0.token_ids == "$greedy_ids"

# ---------------------------------------------------------------------------------------------------------------------------

echo "$num_passed passed, $num_failed failed"
[ "$num_failed" -eq 0 ]
