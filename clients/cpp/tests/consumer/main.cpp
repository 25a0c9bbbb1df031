// Uses the client as a program of somebody else's would, and calls nobody: 0 when all is as it should be.

#include <cstdlib>
#include <hotgraph/hotgraph.hpp>
#include <iostream>

int main() {
    const hotgraph::Client client("unix:/none/such.sock");
    hotgraph::v1::GenerateRequest request;
    *request.mutable_chat() = hotgraph::chat({hotgraph::user("Hello")});
    try {
        for (const auto& event : client.generate(request)) std::cout << event.ShortDebugString() << std::endl;
    } catch (const hotgraph::RetryableError& error) {
        return error.code() == grpc::StatusCode::UNAVAILABLE ? EXIT_SUCCESS : EXIT_FAILURE;
    }
    return EXIT_FAILURE;
}
