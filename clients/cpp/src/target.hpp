// What a target is, judged from its text: whether it is this host. It connects to nothing.
#pragma once

#include <string>

namespace hotgraph {

// Whether every address of the target is a Unix socket or this host's loopback.
bool is_local(const std::string& target);

}  // namespace hotgraph
