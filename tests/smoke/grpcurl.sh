#!/usr/bin/env bash
# Asks a running daemon, with grpcurl, for everything a caller can ask for, and checks the answers.
#
#   tests/smoke/grpcurl.sh [TARGET]       TARGET: unix:PATH or HOST:PORT. Default: $HOTGRAPH_TARGET, else unix:hotgraph.sock
#
# One line a check: `ok NAME`, `FAIL NAME` (what came instead follows on standard error) or `skip NAME: why`. Exit status:
# 0 all passed, 1 a check failed, 2 wrong usage or no grpcurl. Nothing of the daemon is changed but that it captures a graph.
# What can be set is in the README beside this file. Run it after an upgrade; read it to see how a call looks.
set -uo pipefail

target=${1:-${HOTGRAPH_TARGET:-unix:hotgraph.sock}}
if [ $# -gt 1 ] || [ "$target" = -h ] || [ "$target" = --help ]; then
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
fi

# ---- How to reach the daemon ----------------------------------------------------------------------------------------

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
grpcurl=${GRPCURL:-}
for candidate in "$(command -v grpcurl || true)" "$here/../../.tools/bin/grpcurl"; do
    [ -z "$grpcurl" ] && [ -n "$candidate" ] && [ -x "$candidate" ] && grpcurl=$candidate
done
if [ -z "$grpcurl" ] || [ ! -x "$grpcurl" ]; then
    echo "no grpcurl: tests/smoke/install_grpcurl.sh builds it; or set GRPCURL to its path" >&2
    exit 2
fi
python=${PYTHON:-python3}

read -r -a flags <<<"${GRPCURL_FLAGS:--plaintext}"
flags+=(-connect-timeout "${SMOKE_CONNECT_SECONDS:-10}" -max-time "${SMOKE_MAX_SECONDS:-60}")
if [ -n "${HOTGRAPH_TOKEN_FILE:-}" ]; then
    # grpcurl reads the token from its environment: it is in no list of processes.
    HOTGRAPH_SMOKE_TOKEN=$(cat "$HOTGRAPH_TOKEN_FILE") || exit 2
    export HOTGRAPH_SMOKE_TOKEN
    # shellcheck disable=SC2016  # grpcurl expands it
    flags+=(-expand-headers -H 'authorization: Bearer ${HOTGRAPH_SMOKE_TOKEN}')
fi
address=$target
if [[ $target == unix:* ]]; then
    address=${target#unix:}
    # Of a relative path grpcurl takes the first part for a host.
    [[ $address == /* ]] || address=$PWD/$address
    flags+=(-unix)
fi

# ---- How a check reads ----------------------------------------------------------------------------------------------
#
#   call METHOD [JSON]           sends it; keeps what came, and grpcurl's exit status (64 + the gRPC code)
#   shows NAME TEXT...           the check NAME: the call went well and every TEXT is in what came
#   holds NAME EXPRESSION        the check NAME: the call went well and the Python expression is true of `answer`, the JSON
#                                that came (`answers` for a stream; `args` are further arguments, parsed as JSON)
#   fails NAME CODE TEXT...      the check NAME: the call ended with this gRPC code, and every TEXT is in the error
#   value EXPRESSION             prints the JSON of an expression over what came

output=
status=0
num_passed=0
num_failed=0

passed() { echo "ok $1"; num_passed=$((num_passed + 1)); }
skipped() { echo "skip $1: $2"; }
failed() {
    echo "FAIL $1"
    num_failed=$((num_failed + 1))
    { echo "  $2"; echo "  grpcurl ended with status $status and said:"; head -n 60 <<<"$output" | sed 's/^/  | /'; } >&2
}

ask() { output=$("$grpcurl" "$@" 2>&1); status=$?; }
call() { ask "${flags[@]}" -d "${2:-{\}}" "$address" "$1"; }
list() { ask "${flags[@]}" "$address" list "$@"; }
describe() { ask "${flags[@]}" "$address" describe "$@"; }

# shellcheck disable=SC2016
reader='
import base64, json, sys
decoder, text, answers = json.JSONDecoder(), sys.stdin.read(), []
text = text[: text.find("ERROR:")] if "ERROR:" in text else text
while text.strip():
    answer, end = decoder.raw_decode(text.lstrip())
    answers.append(answer)
    text = text.lstrip()[end:]
answer = answers[0] if answers else {}
args = [json.loads(argument) for argument in sys.argv[1:]]
'

value() { "$python" -c "$reader"$'\n'"print(json.dumps($1))" "${@:2}" <<<"$output"; }

shows() {
    local name=$1 text
    shift
    if [ "$status" -ne 0 ]; then failed "$name" "the call failed"; return; fi
    for text in "$@"; do
        if ! grep -qF -- "$text" <<<"$output"; then failed "$name" "missing: $text"; return; fi
    done
    passed "$name"
}

holds() {
    local name=$1 expression=$2 result
    shift 2
    if [ "$status" -ne 0 ]; then failed "$name" "the call failed"; return; fi
    if ! result=$("$python" -c "$reader"$'\n'"print(bool($expression))" "$@" 2>&1 <<<"$output"); then
        failed "$name" "not what was expected ($(tail -n 1 <<<"$result")): $expression"
    elif [ "$result" != True ]; then
        failed "$name" "does not hold: $expression"
    else
        passed "$name"
    fi
}

fails() {
    local name=$1 code=$2 text
    shift 2
    if [ "$status" -eq 0 ]; then failed "$name" "the call went well, expected $code"; return; fi
    for text in "Code: $code" "$@"; do
        if ! grep -qF -- "$text" <<<"$output"; then failed "$name" "missing: $text"; return; fi
    done
    passed "$name"
}

inference=hotgraph.v1.InferenceService
graph=hotgraph.v1.GraphService
admin=hotgraph.v1.AdminService

# ---- Reflection: what the daemon offers, told by itself ---------------------------------------------------------------

list
shows "list services" "$inference" "$graph" "$admin" grpc.health.v1.Health grpc.reflection.v1alpha.ServerReflection
if [ "$status" -ne 0 ]; then
    echo "no daemon answers at $target: the other checks are left out" >&2
    exit 1
fi

list "$inference"
shows "list methods" "$inference.Generate" "$inference.Complete" "$inference.Tokenize" "$inference.GetModel"

describe "$inference"
shows "describe a service" "rpc Generate ( .hotgraph.v1.GenerateRequest ) returns ( stream .hotgraph.v1.GenerateResponse );"

describe hotgraph.v1.GenerateRequest
shows "describe a message" "oneof prompt" ".hotgraph.v1.ChatPrompt chat" "optional uint32 max_tokens"

describe hotgraph.v1.GraphState
shows "describe an enum" "GRAPH_STATE_READY = 3;"

# ---- Health: is it ready for work? --------------------------------------------------------------------------------------

call grpc.health.v1.Health/Check '{}'
holds "health, overall" 'answer["status"] == "SERVING"'

for service in "$inference" "$graph" "$admin"; do
    call grpc.health.v1.Health/Check "{\"service\": \"$service\"}"
    holds "health of $service" 'answer["status"] == "SERVING"'
done

call grpc.health.v1.Health/Check '{"service": "no.such.Service"}'
fails "health of what is not there" NotFound

# A watch goes on until the caller leaves: two seconds are enough to see the first answer.
ask "${flags[@]}" -max-time 2 -d '{}' "$address" grpc.health.v1.Health/Watch
status=0
shows "health, watched" SERVING

# ---- What it is and does ------------------------------------------------------------------------------------------------

call "$admin/GetStatus"
holds "GetStatus" 'answer["state"] == "DAEMON_STATE_SERVING" and answer["version"] and answer["scheduler"]["num_slots"] > 0
    and answer["model"] and answer["kv_cache"]["num_blocks"] > 0'
holds "GetStatus adds up" '(lambda kv: sum(kv.get(name, 0) for name in
    ("num_free_blocks", "num_cached_blocks", "num_used_blocks")) == kv["num_blocks"])(answer["kv_cache"])'

call "$inference/ListModels"
holds "ListModels" 'len(answer["models"]) >= 1 and all(model["name"] == "models/" + model["id"] for model in answer["models"])'

call "$inference/GetModel"
holds "GetModel" 'answer["model"]["context_length"] > 0 and answer["model"]["vocabulary_size"] > 0 and answer["model"]["dtype"]
    and answer["model"]["device"]'
has_chat=$(value 'bool(answer.get("model", {}).get("chat_template"))')

call "$admin/ListClients" '{"page_size": 1000}'
holds "ListClients" 'any("grpcurl" in client.get("user_agent", "") for client in answer["clients"])'

# ---- Text and tokens ----------------------------------------------------------------------------------------------------

call "$inference/Tokenize" '{"text": "Hello, world!", "add_special_tokens": false}'
holds "Tokenize" 'len(answer["token_ids"]) == len(answer["pieces"]) > 0'
holds "Tokenize, the bytes of each token" \
    'b"".join(map(base64.b64decode, answer["pieces"])).decode().strip() == "Hello, world!"'
ids=$(value 'answer.get("token_ids", [])')

call "$inference/Detokenize" "{\"token_ids\": $ids}"
holds "Detokenize" 'answer["text"].strip() == "Hello, world!"'

# ---- Complete: all of it in one answer ------------------------------------------------------------------------------------

greedy='"sampling": {"temperature": 0}'
length='"max_tokens": 12, "stop": {"ignore_eos": true}'

call "$inference/Complete" "{\"text\": \"The capital of France is\", $greedy, $length}"
holds "Complete, text" 'len(answer["choices"][0]["token_ids"]) == 12 and answer["choices"][0]["text"]
    and answer["choices"][0]["finish"]["reason"] == "FINISH_REASON_LENGTH" and answer["usage"]["completion_tokens"] == 12'
holds "Complete, receipt" '(lambda receipt: receipt["num_steps"] > 0 and receipt["num_steps"] ==
    receipt.get("num_graph_steps", 0) + receipt.get("num_eager_steps", 0) ==
    sum(group["num_steps"] for group in receipt["step_groups"]))(answer["receipt"])'
holds "Complete, timings" 'all(answer["timings"][name].endswith("s") for name in ("time_to_first_token", "total", "decode"))'
greedy_ids=$(value '[choice["token_ids"] for choice in answer["choices"]][0]')
greedy_text=$(value 'answer["choices"][0]["text"]')

call "$inference/Tokenize" '{"text": "The capital of France is"}'
prompt_ids=$(value 'answer["token_ids"]')
call "$inference/Complete" "{\"token_ids\": {\"ids\": $prompt_ids}, $greedy, $length}"
holds "Complete, token ids, as the same text" 'answer["choices"][0]["token_ids"] == args[0]' "$greedy_ids"


if [ "$has_chat" = true ]; then
    question='{"role": "CHAT_ROLE_USER", "content": "What is the capital of France?"}'
    call "$inference/Complete" "{\"chat\": {\"messages\": [$question]}, $greedy, \"max_tokens\": 24}"
    holds "Complete, chat" 'answer["choices"][0]["text"].strip() and answer["usage"]["prompt_tokens"] > 0
        and answer["choices"][0]["finish"]["reason"] in ("FINISH_REASON_STOP", "FINISH_REASON_LENGTH")'
    echo "  the model answers: $(value 'answer["choices"][0]["text"]')" >&2
else
    skipped "Complete, chat" "the model has no chat template"
fi

call "$inference/Complete" "{\"text\": \"Once upon a time\", $length, \"num_choices\": 2}"
holds "Complete, two choices" '[choice.get("index", 0) for choice in answer["choices"]] == [0, 1]
    and answer["usage"]["completion_tokens"] == 24'

seeded='{"text": "Once upon a time", "sampling": {"temperature": 1, "seed": 7}, "max_tokens": 12, "stop": {"ignore_eos": true}}'
call "$inference/Complete" "$seeded"
holds "Complete, seeded" 'answer["seed"] == "7" and len(answer["choices"][0]["token_ids"]) == 12'
seeded_ids=$(value 'answer["choices"][0]["token_ids"]')
call "$inference/Complete" "$seeded"
holds "Complete, the same seed gives the same tokens" 'answer["choices"][0]["token_ids"] == args[0]' "$seeded_ids"

call "$inference/Complete" "{\"text\": \"The capital of France is\", $greedy, $length, \"output\": {\"logprobs\": 3}}"
holds "Complete, log-probabilities" 'len(answer["choices"][0]["logprobs"]) == 12 and all(
    len(token["top"]) == 3 and token["chosen"].get("token_id", 0) == token["top"][0].get("token_id", 0)
    and all(top.get("logprob", 0) <= 0 for top in token["top"]) for token in answer["choices"][0]["logprobs"])'
holds "Complete, log-probabilities change no token" 'answer["choices"][0]["token_ids"] == args[0]' "$greedy_ids"

# A stop string: some characters from the middle of what the model says here anyway.
stop=$(value 'args[0][len(args[0]) // 2 :][:4]' "$greedy_text")
call "$inference/Complete" "{\"text\": \"The capital of France is\", $greedy, \"max_tokens\": 12,
    \"stop\": {\"ignore_eos\": true, \"strings\": [$stop]}}"
holds "Complete, stop string" 'answer["choices"][0].get("text", "") == args[0][: args[0].find(args[1])]
    and answer["choices"][0]["finish"] == {"reason": "FINISH_REASON_STOP", "stop_string": args[1]}' "$greedy_text" "$stop"

# ---- Generate: the same, as it is made ------------------------------------------------------------------------------------

call "$inference/Generate" "{\"text\": \"The capital of France is\", $greedy, $length, \"request_id\": \"smoke-$$\"}"
holds "Generate, started first and finished last" 'len(answers) >= 3 and answers[0]["started"]["request_id"] == args[0]
    and "finished" in answers[-1] and all("tokens" in event for event in answers[1:-1])' "\"smoke-$$\""
holds "Generate, the tokens of Complete" '[token for event in answers for token in event.get("tokens", {}).get("token_ids", [])]
    == args[0]' "$greedy_ids"
holds "Generate, the text of Complete" '"".join(event.get("tokens", {}).get("text", "") for event in answers) == args[0]' \
    "$greedy_text"
holds "Generate, receipt" 'answers[-1]["finished"]["receipt"]["num_steps"] > 0
    and answers[-1]["finished"]["usage"]["completion_tokens"] == 12'

# ---- The graph cache ------------------------------------------------------------------------------------------------------

call "$graph/PrewarmGraphs" '{"keys": [{"tokens": 1, "rows": 1, "sampler": "SAMPLER_VARIANT_GREEDY"}], "wait": "30s"}'
holds "PrewarmGraphs" '[entry["state"] for entry in answer["graphs"]] == ["GRAPH_STATE_READY"]'
name=$(value 'answer["graphs"][0]["name"]')

call "$graph/ListGraphs" '{"page_size": 1000}'
holds "ListGraphs" 'args[0] in [entry["name"] for entry in answer["graphs"]]
    and len(answer["graphs"]) == min(answer["total_size"], 1000)
    and all(entry["key"]["tokens"] >= entry["key"]["rows"] >= 1 for entry in answer["graphs"])' "$name"

call "$graph/GetGraph" "{\"name\": $name}"
holds "GetGraph" 'answer["graph"]["name"] == args[0] and answer["graph"]["key"]["tokens"] == 1' "$name"

call "$graph/GetBudget"
holds "GetBudget" 'int(answer["budget"]["limit_bytes"]) > 0
    and int(answer["budget"].get("used_bytes", 0)) <= int(answer["budget"]["limit_bytes"])'

ask "${flags[@]}" -max-time 2 -d '{"after_sequence": "0"}' "$address" "$graph/WatchGraphs"
status=0
shows "WatchGraphs" '"sequence"' GRAPH_EVENT_TYPE_

call "$graph/ExportProfile"
holds "ExportProfile" 'len(answer["profile"]["entries"]) >= 1 and answer["profile"]["model"]'

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
holds "after all that it answers as before" 'answer["choices"][0]["token_ids"] == args[0]' "$greedy_ids"

# ---------------------------------------------------------------------------------------------------------------------------

echo "$num_passed passed, $num_failed failed"
[ "$num_failed" -eq 0 ]
