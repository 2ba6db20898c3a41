"""Prompts whose answers have a form: 14 JSON schemas and 5 sets of tools, made for this project."""

from __future__ import annotations

from typing import Any, NamedTuple


class Task(NamedTuple):
    """A question, and the JSON schema of its answer."""

    name: str
    prompt: str
    schema: dict[str, Any]


TEXT: dict[str, Any] = {"type": "string"}
WHOLE: dict[str, Any] = {"type": "integer"}
NUMBER: dict[str, Any] = {"type": "number"}
FLAG: dict[str, Any] = {"type": "boolean"}


def one_of(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


def many(items: dict[str, Any], least: int = 1, most: int = 4) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def record(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


MAIL = """Dear team, I ordered two standing desks (order 48213) on 3 March and one arrived with a
broken leg. Please send a replacement to 14 Harbour Lane, Bristol. I am rather annoyed, since this
is the second time. You can reach me at +44 7700 900123 or anna.keller@example.org. Anna Keller"""
REVIEW = """The espresso machine heats up in under a minute and the coffee is excellent.
But the milk frother is loud and the water tank is too small for our office. After three months
the drip tray began to rust. For 349 euros I expected better materials."""
MINUTES = """Monday, 10 am. Present: Lena, Omar, Priya. Omar finishes the login page by Friday.
Priya writes the migration script, due next Wednesday. Lena asks the customer about the logo, no
date yet. The release moves to 12 May because the payment provider is late."""
LOG = """2026-03-01 12:00:03 ERROR payments: timeout after 30s calling https://bank.example/api
2026-03-01 12:00:04 WARN payments: retry 1 of 3
2026-03-01 12:00:35 ERROR payments: timeout after 30s calling https://bank.example/api"""

SCHEMAS = [
    Task(
        "support",
        f"Read this mail and extract the ticket.\n\n{MAIL}",
        record(
            customer_name=TEXT,
            email_address=TEXT,
            phone_number=TEXT,
            order_number=WHOLE,
            product=TEXT,
            quantity=WHOLE,
            issue_category=one_of("damaged", "missing", "late", "billing", "other"),
            sentiment=one_of("positive", "neutral", "negative"),
            requires_callback=FLAG,
            summary=TEXT,
        ),
    ),
    Task(
        "review",
        f"Judge this product review.\n\n{REVIEW}",
        record(
            product_type=TEXT,
            overall_rating=WHOLE,
            positive_points=many(TEXT),
            negative_points=many(TEXT),
            price_in_euros=NUMBER,
            would_recommend=FLAG,
        ),
    ),
    Task(
        "minutes",
        f"List the action items of these minutes.\n\n{MINUTES}",
        record(
            meeting_date=TEXT,
            participants=many(TEXT),
            action_items=many(
                record(
                    assigned_to=TEXT,
                    description=TEXT,
                    due_date=TEXT,
                    priority=one_of("low", "medium", "high"),
                )
            ),
            release_date=TEXT,
        ),
    ),
    Task(
        "incident",
        f"Describe the incident in this log.\n\n{LOG}",
        record(
            service_name=TEXT,
            severity=one_of("info", "warning", "error", "critical"),
            first_occurrence=TEXT,
            last_occurrence=TEXT,
            error_count=WHOLE,
            probable_cause=TEXT,
            recommended_action=TEXT,
        ),
    ),
    Task(
        "recipe",
        "Give a recipe for tomato soup for four people.",
        record(
            recipe_name=TEXT,
            servings=WHOLE,
            preparation_minutes=WHOLE,
            ingredients=many(record(name=TEXT, amount=NUMBER, unit=TEXT), 3, 5),
            steps=many(TEXT, 2, 4),
        ),
    ),
    Task(
        "book",
        "Describe the novel Pride and Prejudice.",
        record(
            title=TEXT,
            author=record(first_name=TEXT, last_name=TEXT, birth_year=WHOLE),
            publication_year=WHOLE,
            genres=many(TEXT),
            main_characters=many(record(name=TEXT, role=TEXT), 2, 4),
            one_sentence_summary=TEXT,
        ),
    ),
    Task(
        "server",
        "Write the configuration of a small web server for example.org with TLS on port 8443.",
        record(
            server_name=TEXT,
            listen=record(address=TEXT, port=WHOLE, tls_enabled=FLAG),
            certificate_path=TEXT,
            private_key_path=TEXT,
            max_connections=WHOLE,
            timeout_seconds=WHOLE,
            log_level=one_of("debug", "info", "warning", "error"),
            allowed_methods=many(one_of("GET", "POST", "PUT", "DELETE")),
        ),
    ),
    Task(
        "cities",
        "Name the three largest cities of Germany with their population.",
        record(
            country=TEXT,
            cities=many(
                record(
                    city_name=TEXT,
                    population=WHOLE,
                    federal_state=TEXT,
                    is_capital=FLAG,
                    latitude=NUMBER,
                    longitude=NUMBER,
                ),
                3,
                3,
            ),
        ),
    ),
    Task(
        "quiz",
        "Make a multiple-choice question about photosynthesis.",
        record(
            topic=TEXT,
            difficulty=one_of("easy", "medium", "hard"),
            question=TEXT,
            choices=many(record(label=one_of("A", "B", "C", "D"), text=TEXT), 4, 4),
            correct_label=one_of("A", "B", "C", "D"),
            explanation=TEXT,
        ),
    ),
    Task(
        "function",
        "Describe the Python function `def area(width: float, height: float) -> float`.",
        record(
            function_name=TEXT,
            parameters=many(record(name=TEXT, type=TEXT, description=TEXT, required=FLAG), 2, 2),
            return_type=TEXT,
            side_effects=FLAG,
            time_complexity=TEXT,
        ),
    ),
    Task(
        "flight",
        "Book: Ms Ito wants to fly from Osaka to Paris on 9 June 2026, business class, vegetarian.",
        record(
            passenger=record(title=one_of("Mr", "Ms", "Mx"), last_name=TEXT),
            departure_city=TEXT,
            arrival_city=TEXT,
            departure_date=TEXT,
            travel_class=one_of("economy", "premium_economy", "business", "first"),
            meal_preference=one_of("standard", "vegetarian", "vegan", "kosher", "halal"),
            number_of_bags=WHOLE,
        ),
    ),
    Task(
        "plan",
        "Plan a day of sightseeing in Rome.",
        record(
            destination=TEXT,
            activities=many(
                record(
                    start_time=TEXT,
                    end_time=TEXT,
                    activity_name=TEXT,
                    estimated_cost_in_euros=NUMBER,
                    booking_required=FLAG,
                ),
                3,
                4,
            ),
        ),
    ),
    Task(
        "classify",
        "Classify: 'Stocks fell sharply on Tuesday after the central bank raised interest rates.'",
        record(
            primary_category=one_of("politics", "business", "sport", "science", "culture"),
            confidence_score=NUMBER,
            named_entities=many(record(entity_text=TEXT, entity_type=TEXT)),
            contains_personal_data=FLAG,
            language_code=TEXT,
        ),
    ),
    Task(
        "person",
        "Invent a user of an online shop.",
        record(
            user_id=WHOLE,
            first_name=TEXT,
            last_name=TEXT,
            date_of_birth=TEXT,
            billing_address=record(street=TEXT, house_number=WHOLE, city=TEXT, postal_code=TEXT),
            shipping_address=record(street=TEXT, house_number=WHOLE, city=TEXT, postal_code=TEXT),
            newsletter_subscribed=FLAG,
            preferred_language=TEXT,
        ),
    ),
]


def call(name: str, **arguments: dict[str, Any]) -> dict[str, Any]:
    return record(name={"const": name}, arguments=record(**arguments))


TOOLS = {
    "get_current_weather": call(
        "get_current_weather", location=TEXT, unit=one_of("celsius", "fahrenheit")
    ),
    "search_flights": call(
        "search_flights",
        departure_airport=TEXT,
        arrival_airport=TEXT,
        departure_date=TEXT,
        number_of_passengers=WHOLE,
    ),
    "create_calendar_event": call(
        "create_calendar_event",
        event_title=TEXT,
        start_time=TEXT,
        duration_minutes=WHOLE,
        attendees=many(TEXT),
    ),
    "read_file": call("read_file", file_path=TEXT, start_line=WHOLE, end_line=WHOLE),
    "send_email": call("send_email", recipient_address=TEXT, subject=TEXT, message_body=TEXT),
}

_CALLS = {"anyOf": list(TOOLS.values())}
_SYSTEM = f"You call one of these tools: {', '.join(TOOLS)}.\n\n"

TOOL_TASKS = [
    Task("weather", _SYSTEM + "What is the weather like in Lisbon, in celsius?", _CALLS),
    Task("flights", _SYSTEM + "Two of us want to fly from VIE to KEF on 2026-08-14.", _CALLS),
    Task("event", _SYSTEM + "Meet Bo and Ria for an hour on Monday at 9:00 on budgets.", _CALLS),
    Task("file", _SYSTEM + "Show me lines 20 to 60 of src/engine/scheduler.py.", _CALLS),
    Task("mail", _SYSTEM + "Write to sam@example.org that the invoice is overdue.", _CALLS),
]
