// What the tests under tests/interop are told, and what they tell it.
#pragma once

#include <string>

namespace hotgraph::testing {

// Those of the daemons that tests/interop started.
struct Addresses {
    std::string model, unix_socket, tcp, cut, headers_cut;
    struct {
        std::string target, roots, token;
    } tls;
    struct {
        std::string target, roots, chain, key;
    } mutual_tls;
    struct {
        std::string target, drained;
    } handover;
};

// Whether anybody started daemons.
bool has_daemons();
Addresses daemons();

// Reports a case of tests/interop/cases.json, unless the running test has failed.
void passed(const std::string& name);

std::string read_file(const std::string& path);

}  // namespace hotgraph::testing

// Skips the test when nobody started daemons.
#define HOTGRAPH_NEED_DAEMONS() \
    if (!::hotgraph::testing::has_daemons()) GTEST_SKIP() << "needs daemons: make test-client-cpp"
