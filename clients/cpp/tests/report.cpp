#include "report.hpp"

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace hotgraph::testing {
namespace {

using google::protobuf::Struct;

void report(const std::string& line) {
    const char* path = std::getenv("HOTGRAPH_INTEROP_REPORT");
    if (!path) return;
    std::ofstream file(path, std::ios::app);
    file << line << std::endl;
    if (!file) throw std::runtime_error(std::string("cannot write ") + path);
}

std::string text_of(const Struct& object, const std::string& key) { return object.fields().at(key).string_value(); }

const Struct& object_of(const Struct& object, const std::string& key) { return object.fields().at(key).struct_value(); }

}  // namespace

bool has_daemons() { return std::getenv("HOTGRAPH_INTEROP") != nullptr; }

std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    if (!(text << file.rdbuf())) throw std::runtime_error("cannot read " + path);
    return text.str();
}

Addresses daemons() {
    Struct told;
    const auto status = google::protobuf::util::JsonStringToMessage(read_file(std::getenv("HOTGRAPH_INTEROP")), &told);
    if (!status.ok()) throw std::runtime_error(status.ToString());
    const Struct &tls = object_of(told, "tls"), &mutual = object_of(told, "mutual_tls"),
                 &handover = object_of(told, "handover");
    Addresses found;
    found.model = text_of(told, "model");
    found.unix_socket = text_of(told, "unix");
    found.tcp = text_of(told, "tcp");
    found.cut = text_of(told, "cut");
    found.headers_cut = text_of(told, "headers_cut");
    found.tls = {text_of(tls, "target"), text_of(tls, "root_certificates"), text_of(tls, "token")};
    found.mutual_tls = {text_of(mutual, "target"), text_of(mutual, "root_certificates"),
                        text_of(mutual, "certificate_chain"), text_of(mutual, "private_key")};
    found.handover = {text_of(handover, "target"), text_of(handover, "drained")};
    return found;
}

void passed(const std::string& name) {
    if (!::testing::Test::HasFailure()) report("passed " + name);
}

// The report names the language and gRPC's version.
TEST(Report, TellsVersions) {
    report("language C++ 17 (g++ " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__) + ")");
    report("library grpc++ " + grpc::Version());
}

}  // namespace hotgraph::testing
