#include "target.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <algorithm>
#include <sstream>

namespace hotgraph {
namespace {

bool starts_with(const std::string& text, const std::string& prefix) {
    return text.compare(0, prefix.size(), prefix) == 0;
}

// HOST of HOST:PORT, [HOST]:PORT or HOST.
std::string host_of(const std::string& address) {
    if (starts_with(address, "[")) return address.substr(1, address.find(']') - 1);
    if (std::count(address.begin(), address.end(), ':') == 1) return address.substr(0, address.find(':'));
    return address;
}

bool is_loopback(const std::string& host) {
    if (host == "localhost") return true;
    in_addr v4{};
    if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return ntohl(v4.s_addr) >> 24 == 127;
    in6_addr v6{};
    return inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

}  // namespace

bool is_local(const std::string& target) {
    if (starts_with(target, "unix:") || starts_with(target, "unix-abstract:")) return true;
    std::string addresses = target;
    for (const std::string prefix : {"dns:", "ipv4:", "ipv6:", "///"}) {
        if (starts_with(addresses, prefix)) addresses.erase(0, prefix.size());
    }
    std::istringstream rest(addresses);
    bool is_any = false;
    for (std::string address; std::getline(rest, address, ',');) {
        if (!is_loopback(host_of(address))) return false;
        is_any = true;
    }
    return is_any;
}

}  // namespace hotgraph
