(() => {
  "use strict";
  document.querySelectorAll(".filter").forEach((form) => {
    const cards = [...form.parentElement.querySelectorAll(".card")];
    if (cards.length < 4) return;
    const text = form.querySelector(".filter-text");
    const wrong = form.querySelector(".filter-wrong");
    const count = form.querySelector(".filter-count");
    const apply = () => {
      const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const card of cards) {
        const fits = words.every((word) => card.dataset.words.includes(word));
        card.hidden = !fits || Boolean(wrong && wrong.checked && !("wrong" in card.dataset));
        shown += card.hidden ? 0 : 1;
      }
      count.textContent = shown === cards.length ? `${shown} targets` : `${shown} of ${cards.length} targets`;
    };
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    apply();
  });
  // Paper has no buttons: everything is unfolded for the printer, and folded again afterwards.
  let unfolded = [];
  addEventListener("beforeprint", () => {
    unfolded = [...document.querySelectorAll("details:not([open])")];
    unfolded.forEach((details) => { details.open = true; });
  });
  addEventListener("afterprint", () => unfolded.forEach((details) => { details.open = false; }));
})();
