// SHA-256 (FIPS 180-4), for session keys that no header may hold: too little to depend on a library for, of which gRPC
// itself may bring another. It is used to name, not to protect.
#pragma once

#include <string>

namespace hotgraph {

// 64 hexadecimal digits in lower case.
std::string sha256_hex(const std::string& bytes);

}  // namespace hotgraph
