package dev.hotgraph.client;

import dev.hotgraph.v1.ChatMessage;
import dev.hotgraph.v1.ChatPrompt;
import dev.hotgraph.v1.ChatRole;
import java.util.Arrays;

/** Conversations, for the field {@code chat} of a request. */
public final class Chat {
    private Chat() {}

    /** A conversation, oldest turn first. */
    public static ChatPrompt of(ChatMessage... messages) {
        return of(Arrays.asList(messages));
    }

    /** A conversation, oldest turn first. */
    public static ChatPrompt of(Iterable<ChatMessage> messages) {
        return ChatPrompt.newBuilder().addAllMessages(messages).build();
    }

    /** A turn with instructions for the whole conversation. */
    public static ChatMessage system(String text) {
        return turn(ChatRole.CHAT_ROLE_SYSTEM, text);
    }

    /** A turn of who asks. */
    public static ChatMessage user(String text) {
        return turn(ChatRole.CHAT_ROLE_USER, text);
    }

    /** A turn of the model. */
    public static ChatMessage assistant(String text) {
        return turn(ChatRole.CHAT_ROLE_ASSISTANT, text);
    }

    private static ChatMessage turn(ChatRole role, String text) {
        return ChatMessage.newBuilder().setRole(role).setContent(text).build();
    }
}
