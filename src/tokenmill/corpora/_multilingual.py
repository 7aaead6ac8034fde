"""Short lines in ten languages, put together from phrases that were written for this repository.

Each language has eight subjects and eight predicates; every pair is a plain sentence, and a line holds two of them.
The lines are grammatical and say little: they show how a language looks to a tokenizer, not how people write.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenmill.corpora._corpus import Record

LICENCE = "Apache-2.0"
SOURCE = "written for this repository: phrases in ten languages and their combinations"

# language -> (subjects, predicates, what joins them, what ends a sentence)
_PHRASES: dict[str, tuple[str, str, str, str]] = {
    "german": (
        "Die alte Lehrerin|Unser Nachbar|Der junge Arzt|Meine Schwester|Der Bäcker im Dorf|Die Köchin|Ein Reisender"
        "|Das Mädchen am Fenster",
        "liest jeden Abend die Zeitung von gestern|sucht seit Stunden einen Schlüssel für den Keller"
        "|erzählt gern Geschichten über das Meer|bezahlt die Rechnung erst am Monatsende"
        "|wartet bei Regen an der Haltestelle|schreibt einen langen Brief an die Behörde"
        "|kauft auf dem Markt frisches Gemüse|spricht leise mit den Gästen im Garten",
        " ",
        ". ",
    ),
    "french": (
        "La vieille institutrice|Notre voisin|Le jeune médecin|Ma sœur|Le boulanger du village|La cuisinière"
        "|Un voyageur|La fille à la fenêtre",
        "lit chaque soir le journal de la veille|cherche depuis une heure la clé de la cave"
        "|raconte volontiers des histoires de mer|paie la facture à la fin du mois"
        "|attend sous la pluie à l'arrêt de bus|écrit une longue lettre à la mairie"
        "|achète des légumes frais au marché|parle à voix basse avec les invités du jardin",
        " ",
        ". ",
    ),
    "spanish": (
        "La vieja maestra|Nuestro vecino|El joven médico|Mi hermana|El panadero del pueblo|La cocinera|Un viajero"
        "|La niña de la ventana",
        "lee cada noche el periódico de ayer|busca desde hace horas la llave del sótano"
        "|cuenta con gusto historias del mar|paga la cuenta a fin de mes"
        "|espera bajo la lluvia en la parada|escribe una carta larga al ayuntamiento"
        "|compra verduras frescas en el mercado|habla en voz baja con los invitados del jardín",
        " ",
        ". ",
    ),
    "polish": (
        "Stara nauczycielka|Nasz sąsiad|Młody lekarz|Moja siostra|Piekarz ze wsi|Kucharka|Pewien podróżny"
        "|Dziewczyna przy oknie",
        "czyta co wieczór wczorajszą gazetę|szuka od godziny klucza do piwnicy"
        "|chętnie opowiada historie o morzu|płaci rachunek dopiero pod koniec miesiąca"
        "|czeka w deszczu na przystanku|pisze długi list do urzędu"
        "|kupuje na targu świeże warzywa|rozmawia cicho z gośćmi w ogrodzie",
        " ",
        ". ",
    ),
    "turkish": (
        "Yaşlı öğretmen|Komşumuz|Genç doktor|Kız kardeşim|Köydeki fırıncı|Aşçı kadın|Bir yolcu|Penceredeki kız",
        "her akşam dünkü gazeteyi okuyor|saatlerdir bodrumun anahtarını arıyor"
        "|deniz hakkında hikâyeler anlatmayı seviyor|faturayı ancak ay sonunda ödüyor"
        "|yağmurda durakta bekliyor|belediyeye uzun bir mektup yazıyor"
        "|pazardan taze sebze alıyor|bahçedeki misafirlerle alçak sesle konuşuyor",
        " ",
        ". ",
    ),
    "russian": (
        "Старая учительница|Наш сосед|Молодой врач|Моя сестра|Пекарь из деревни|Повариха|Один путешественник"
        "|Девочка у окна",
        "читает каждый вечер вчерашнюю газету|уже час ищет ключ от подвала"
        "|охотно рассказывает истории о море|оплачивает счёт только в конце месяца"
        "|ждёт под дождём на остановке|пишет длинное письмо в управу"
        "|покупает на рынке свежие овощи|тихо разговаривает с гостями в саду",
        " ",
        ". ",
    ),
    "greek": (
        "Η παλιά δασκάλα|Ο γείτονάς μας|Ο νέος γιατρός|Η αδερφή μου|Ο φούρναρης του χωριού|Η μαγείρισσα"
        "|Ένας ταξιδιώτης|Το κορίτσι στο παράθυρο",
        "διαβάζει κάθε βράδυ τη χθεσινή εφημερίδα|ψάχνει εδώ και ώρες το κλειδί του υπογείου"
        "|λέει με χαρά ιστορίες για τη θάλασσα|πληρώνει τον λογαριασμό στο τέλος του μήνα"
        "|περιμένει στη βροχή στη στάση|γράφει ένα μεγάλο γράμμα στον δήμο"
        "|αγοράζει φρέσκα λαχανικά στην αγορά|μιλάει σιγά με τους καλεσμένους στον κήπο",
        " ",
        ". ",
    ),
    "chinese": (
        "老教师|我们的邻居|年轻的医生|我的妹妹|村里的面包师|那位厨师|一位旅客|窗边的女孩",
        "每天晚上都读昨天的报纸|几个小时以来一直在找地下室的钥匙|喜欢讲关于大海的故事|到月底才付账单"
        "|在雨中的车站等车|给市政府写一封长信|在市场上买新鲜的蔬菜|在花园里小声地和客人说话",
        "",
        "。",
    ),
    "japanese": (
        "年をとった先生は|うちの隣の人は|若い医者は|私の妹は|村のパン屋さんは|料理人は|ある旅人は|窓辺の女の子は",
        "毎晩きのうの新聞を読んでいます|何時間も地下室の鍵を探しています|海の話をするのが好きです"
        "|月末になってから勘定を払います|雨の中でバスを待っています|市役所に長い手紙を書いています"
        "|市場で新しい野菜を買います|庭でお客さんと小さな声で話しています",
        "",
        "。",
    ),
    "korean": (
        "나이 많은 선생님은|우리 이웃은|젊은 의사는|내 여동생은|마을의 제빵사는|요리사는|어느 여행자는|창가의 소녀는",
        "매일 저녁 어제 신문을 읽습니다|몇 시간째 지하실 열쇠를 찾고 있습니다|바다 이야기를 즐겨 합니다"
        "|월말에야 계산서를 냅니다|비를 맞으며 정류장에서 기다립니다|시청에 긴 편지를 씁니다"
        "|시장에서 신선한 채소를 삽니다|정원에서 손님들과 조용히 이야기합니다",
        " ",
        ". ",
    ),
}


def lines() -> Iterator[Record]:
    """64 lines of each language; the kind is the language."""
    for language, (subjects, predicates, joint, end) in _PHRASES.items():
        sentences = [f"{who}{joint}{what}{end}" for who in subjects.split("|") for what in predicates.split("|")]
        count = len(sentences)
        for number, first in enumerate(sentences):
            second = sentences[(number * 5 + 11) % count]
            yield Record(f"{language}/{number:02d}", (first + second).strip(), language)
