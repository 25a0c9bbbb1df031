package dev.hotgraph.examples;

import dev.hotgraph.client.Chat;
import dev.hotgraph.client.Generation;
import dev.hotgraph.client.HotgraphClient;
import dev.hotgraph.client.HotgraphException;
import dev.hotgraph.v1.ChatMessage;
import dev.hotgraph.v1.GenerateRequest;
import dev.hotgraph.v1.SamplingParams;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.logging.Level;
import java.util.logging.Logger;

/**
 * A conversation with the model in the terminal: one line is one turn, Ctrl-D ends it. Its argument is the target, such
 * as unix:hotgraph.sock, or HOST:PORT with HOTGRAPH_ROOTS, a PEM file, for TLS; HOTGRAPH_TOKEN is the token.
 */
public final class ChatExample {
    // gRPC warns of each Unix socket that it has no SO_KEEPALIVE. Kept here: a logger that nobody holds forgets its
    // level.
    private static final Logger TRANSPORT = Logger.getLogger("io.grpc.netty.shaded");

    private ChatExample() {}

    /** Runs it. */
    public static void main(String[] arguments) throws IOException {
        TRANSPORT.setLevel(Level.SEVERE);
        HotgraphClient.Builder builder =
                HotgraphClient.builder(arguments.length > 0 ? arguments[0] : HotgraphClient.DEFAULT_TARGET);
        String roots = System.getenv("HOTGRAPH_ROOTS");
        if (roots != null) {
            builder.tls(Path.of(roots));
        }
        String token = System.getenv("HOTGRAPH_TOKEN");
        if (token != null) {
            builder.token(token);
        }
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        PrintStream out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
        try (HotgraphClient client = builder.build()) {
            talk(client, in, out);
        } catch (HotgraphException error) {
            System.err.println(error.getMessage());
            System.exit(1);
        }
    }

    /** Asks one line after the other, with all that was said before. */
    private static void talk(HotgraphClient client, BufferedReader in, PrintStream out) throws IOException {
        List<ChatMessage> messages = new ArrayList<>(List.of(Chat.system("You are a helpful assistant.")));
        while (true) {
            out.print("> ");
            out.flush();
            String line = in.readLine();
            if (line == null) {
                out.println();
                return;
            }
            if (line.isBlank()) {
                continue;
            }
            messages.add(Chat.user(line.strip()));
            messages.add(Chat.assistant(say(client, messages, out)));
        }
    }

    /** Prints one answer as it comes. */
    private static String say(HotgraphClient client, List<ChatMessage> messages, PrintStream out) {
        GenerateRequest request = GenerateRequest.newBuilder()
                .setChat(Chat.of(messages))
                .setSampling(SamplingParams.newBuilder().setTemperature(0.7f))
                .setMaxTokens(256)
                .build();
        try (Generation generation = client.generate(request)) {
            for (String text : generation.texts()) {
                out.print(text);
                out.flush();
            }
            out.println();
            return generation.text();
        }
    }
}
