// A conversation with the model in the terminal: one line is one turn, Ctrl-C stops an answer, Ctrl-D ends it.
//
//   hotgraph_chat --target unix:hotgraph.sock

#include <csignal>
#include <cstdlib>
#include <exception>
#include <hotgraph/hotgraph.hpp>
#include <iostream>
#include <map>
#include <string>

namespace {

volatile std::sig_atomic_t is_interrupted = 0;

void interrupt(int) { is_interrupted = 1; }

// Ctrl-C is for the answer while there is one: the second in a row, or one at the prompt, ends the program.
class Interruptible {
  public:
    Interruptible() {
        is_interrupted = 0;
        struct sigaction action = {};
        action.sa_handler = interrupt;
        action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
        sigaction(SIGINT, &action, &before_);
    }
    ~Interruptible() { sigaction(SIGINT, &before_, nullptr); }
    Interruptible(const Interruptible&) = delete;
    Interruptible& operator=(const Interruptible&) = delete;

  private:
    struct sigaction before_ = {};
};

// Prints one answer as it comes, and gives what there is of it.
std::string say(const hotgraph::Client& client, const hotgraph::v1::GenerateRequest& request) {
    const Interruptible interruptible;
    hotgraph::Generation generation = client.generate(request);
    for (const std::string& text : generation.texts()) {
        std::cout << text << std::flush;
        if (is_interrupted) break;  // the end of `generation` ends the call
    }
    std::cout << std::endl;
    return generation.text();
}

// Asks one line after the other, with all that was said before. The request has all but the prompt.
void converse(const hotgraph::Client& client, hotgraph::v1::GenerateRequest request, const std::string& system) {
    auto& messages = *request.mutable_chat()->mutable_messages();
    *messages.Add() = hotgraph::system(system);
    std::string line;
    while (std::cout << "> " << std::flush && std::getline(std::cin, line)) {
        if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
        *messages.Add() = hotgraph::user(line);
        *messages.Add() = hotgraph::assistant(say(client, request));
    }
    std::cout << std::endl;
}

int run(int argc, char** argv) {
    std::map<std::string, std::string> flags = {
        {"--target", hotgraph::kDefaultTarget},        // unix:PATH or HOST:PORT
        {"--system", "You are a helpful assistant."},  // instructions for the whole conversation
        {"--temperature", "0.7"},                      // 0 is greedy
        {"--max-tokens", "256"},                       // of an answer, at most
        {"--seed", ""},                                // of the sampling; drawn by the server without
        {"--tls-roots", ""},                           // PEM file of the certificates to trust; turns TLS on
        {"--tls-certificate", ""},
        {"--tls-key", ""},  // PEM files of the client, for mutual TLS
    };
    for (int i = 1; i < argc; i += 2) {
        const auto flag = flags.find(argv[i]);
        if (flag == flags.end() || i + 1 == argc) {
            std::cerr << "usage: " << argv[0];
            for (const auto& [name, value] : flags) std::cerr << " [" << name << " VALUE]";
            std::cerr << std::endl;
            return 2;
        }
        flag->second = argv[i + 1];
    }

    hotgraph::ClientOptions options;
    if (!flags["--tls-roots"].empty()) {
        options.tls = hotgraph::Tls::from_files(flags["--tls-roots"], flags["--tls-certificate"], flags["--tls-key"]);
    }
    if (const char* token = std::getenv("HOTGRAPH_TOKEN")) options.token = token;
    const hotgraph::Client client(flags["--target"], options);

    hotgraph::v1::GenerateRequest request;
    request.mutable_sampling()->set_temperature(std::stof(flags["--temperature"]));
    request.set_max_tokens(static_cast<unsigned>(std::stoul(flags["--max-tokens"])));
    if (!flags["--seed"].empty()) request.mutable_sampling()->set_seed(std::stoull(flags["--seed"]));
    converse(client, request, flags["--system"]);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run(argc, argv);
    } catch (const std::invalid_argument& error) {  // a number that is none, or what the client cannot be told
        std::cerr << error.what() << std::endl;
        return 2;
    } catch (const std::exception& error) {
        std::cerr << error.what() << std::endl;
        return 1;
    }
}
