// The golden wire vectors of tests/contract/vectors.json: C++ reads and writes them like all others.

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "hotgraph/hotgraph.hpp"
#include "report.hpp"

namespace hotgraph {
namespace {

using google::protobuf::Message;
using google::protobuf::Value;
using google::protobuf::util::JsonStringToMessage;
using google::protobuf::util::MessageDifferencer;

std::string from_base64(const std::string& text) {
    static const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string bytes;
    unsigned buffer = 0;
    int num_bits = 0;
    for (const char digit : text.substr(0, text.find('='))) {
        buffer = buffer << 6 | static_cast<unsigned>(digits.find(digit));
        if ((num_bits += 6) >= 8) bytes += static_cast<char>(buffer >> (num_bits -= 8) & 0xff);
    }
    return bytes;
}

// Whether two JSON values are the same. Numbers are compared as the contract's fields hold them, floats and integers of
// 32 bits: libraries write as many digits as they like.
bool is_same(const Value& a, const Value& b) {
    if (a.kind_case() != b.kind_case()) return false;
    switch (a.kind_case()) {
        case Value::kNumberValue:
            return a.number_value() == b.number_value() ||
                   static_cast<float>(a.number_value()) == static_cast<float>(b.number_value());
        case Value::kListValue: {
            if (a.list_value().values_size() != b.list_value().values_size()) return false;
            for (int i = 0; i < a.list_value().values_size(); ++i) {
                if (!is_same(a.list_value().values(i), b.list_value().values(i))) return false;
            }
            return true;
        }
        case Value::kStructValue: {
            const auto &left = a.struct_value().fields(), &right = b.struct_value().fields();
            if (left.size() != right.size()) return false;
            for (const auto& [key, value] : left) {
                if (right.count(key) == 0 || !is_same(value, right.at(key))) return false;
            }
            return true;
        }
        default:
            return MessageDifferencer::Equals(a, b);
    }
}

Value parsed(const std::string& json) {
    Value value;
    EXPECT_TRUE(JsonStringToMessage(json, &value).ok()) << json;
    return value;
}

std::unique_ptr<Message> made(const std::string& type) {
    const auto* descriptor = google::protobuf::DescriptorPool::generated_pool()->FindMessageTypeByName(type);
    if (!descriptor) return nullptr;
    return std::unique_ptr<Message>(
        google::protobuf::MessageFactory::generated_factory()->GetPrototype(descriptor)->New());
}

void check_vector(const std::string& type, const std::string& binary, const std::string& json) {
    const auto from_binary = made(type), from_json = made(type), again = made(type);
    ASSERT_TRUE(from_binary) << "no " << type;
    ASSERT_TRUE(from_binary->ParseFromString(binary));
    const auto status = JsonStringToMessage(json, from_json.get());
    ASSERT_TRUE(status.ok()) << status.ToString();
    EXPECT_TRUE(MessageDifferencer::Equals(*from_binary, *from_json))
        << from_binary->DebugString() << from_json->DebugString();
    for (const Message* message : {from_binary.get(), from_json.get()}) {
        const std::string written = message->SerializeAsString();
        EXPECT_EQ(written.size(), binary.size());
        EXPECT_TRUE(again->ParseFromString(written));
        EXPECT_TRUE(MessageDifferencer::Equals(*again, *from_binary));
        std::string text;
        EXPECT_TRUE(google::protobuf::util::MessageToJsonString(*message, &text).ok());
        EXPECT_TRUE(is_same(parsed(text), parsed(json))) << text << "\nwas " << json;
    }
}

// Every vector is read from binary and from JSON into the same message, and written again as it stands.
TEST(Vectors, AreReadAndWrittenLikeByAllOthers) {
    const Value all = parsed(testing::read_file(HOTGRAPH_VECTORS));
    ASSERT_GE(all.list_value().values_size(), 60);
    for (const Value& entry : all.list_value().values()) {
        const auto& fields = entry.struct_value().fields();
        SCOPED_TRACE(fields.at("name").string_value());
        check_vector(fields.at("type").string_value(), from_base64(fields.at("binary").string_value()),
                     fields.at("json").string_value());
    }
    testing::passed("vectors");
}

}  // namespace
}  // namespace hotgraph
