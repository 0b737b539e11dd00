"use strict";
// Search and filter of the answers; without it all of them are there.
(() => {
  const form = document.getElementById("filter");
  const shown = document.getElementById("shown");
  const answers = Array.from(document.querySelectorAll(".answer"), (element) => ({
    element,
    text: element.textContent.toLowerCase(),
  }));
  if (!form) return;
  form.hidden = false;
  const filter = () => {
    const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = ["runtime", "set", "change"].map((key) => [key, form.elements[key].value]);
    let count = 0;
    for (const { element, text } of answers) {
      const fits =
        wanted.every(([key, value]) => !value || element.dataset[key] === value) &&
        words.every((word) => text.includes(word));
      element.hidden = !fits;
      count += fits;
    }
    // Paper has room for what somebody chose.
    form.parentElement.classList.toggle("filtered", count < answers.length);
    shown.textContent = `${count} of ${answers.length} shown`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
})();
